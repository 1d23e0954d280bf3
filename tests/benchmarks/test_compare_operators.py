"""The comparison of operators: what its models compute, how many nodes they have, and what it makes of times."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bdq_runtime.library import LibraryMissingError, library_info
from bdq_runtime.reference.linear import low_bit_linear

try:
    ISAS = library_info().isas
except LibraryMissingError:
    ISAS = ()

needs_library = pytest.mark.skipif(not ISAS, reason="the op library was not built")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("operator_models")


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("machine_limits")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    return importlib.import_module("compare_operators")


@needs_library
@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(2, 8), (3, 4), (4, 4), (8, 8)])
def test_our_node_computes_what_the_reference_does(models: ModuleType, weight_bits: int, activation_bits: int) -> None:
    random = np.random.default_rng(1)
    linear = models.low_bit_linear(models.Shape(200, 40), weight_bits, activation_bits, random)
    x = random.standard_normal((3, 200)).astype(np.float32)
    opened = linear.open(1, x, threads=1)
    opened.run()
    expected = low_bit_linear(x, **linear.weights, n=40, weight_bits=weight_bits, activation_bits=activation_bits)
    np.testing.assert_array_equal(opened.y, expected)


@needs_library
@pytest.mark.parametrize("block", [32, 128])
def test_their_node_multiplies_with_its_weights(models: ModuleType, block: int) -> None:
    random = np.random.default_rng(2)
    linear = models.matmul_nbits(models.Shape(256, 48), block, random)
    x = random.standard_normal((4, 256)).astype(np.float32)
    opened = linear.open(2, x, threads=1)
    opened.run()
    packed = linear.weights["B"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(48, -1, block)
    weight = ((codes - 8.0) * linear.weights["scales"][..., None]).reshape(48, 256)
    assert np.abs(opened.y - x @ weight.T).max() < 0.02 * np.abs(opened.y).max()  # activations have 8 bits
    assert linear.attributes["accuracy_level"] == 4


def test_their_blocks_are_never_padded(models: ModuleType, script: ModuleType) -> None:
    assert models.matmul_nbits(models.Shape(96, 16), 128, np.random.default_rng(3)) is None
    assert list(script.contenders_of(models.Shape(96, 16), 4, 4)) == ["ours", "block 32"]
    assert list(script.contenders_of(models.Shape(128, 16), 4, 4)) == ["ours", "block 32", "block 128"]


def test_with_few_rows_weights_are_cold(models: ModuleType) -> None:
    linear = models.low_bit_linear(models.Shape(576, 960), 4, 4, np.random.default_rng(4))
    assert linear.nbytes == 576 * 960 // 2 + 960 * 2
    for rows in (1, 16):
        nodes = models.nodes_for(linear, rows, 128 << 20)
        assert (nodes - 1) * linear.nbytes < 128 << 20 <= nodes * linear.nbytes
    assert models.nodes_for(linear, 256, 128 << 20) == 8
    assert models.nodes_for(linear, 1 << 20, 128 << 20) == 1


@needs_library
def test_nodes_share_no_weights(models: ModuleType) -> None:
    linear = models.low_bit_linear(models.Shape(64, 16), 4, 4, np.random.default_rng(5))
    opened = linear.open(3, np.ones((1, 64), np.float32), threads=1)
    starts = {array.ctypes.data for array in opened.weights}
    assert len(starts) == 3 * len(linear.weights)
    assert all(start % models.PAGE == 0 for start in starts)


def test_the_last_cache_is_found_and_bounded(limits: ModuleType, tmp_path: Path) -> None:
    for index, (level, size) in enumerate([("1", "32K"), ("3", "96M"), ("2", "512K")]):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "level").write_text(f"{level}\n")
        (folder / "size").write_text(f"{size}\n")
    assert limits.last_cache_bytes(tmp_path) == 96 << 20
    assert limits.last_cache_bytes(tmp_path / "none") == 0
    assert limits.cold_bytes(96 << 20) == 384 << 20
    assert limits.cold_bytes(0) == 128 << 20
    assert limits.cold_bytes(504 << 20) == 1 << 30


def test_shares_and_ratios(models: ModuleType, script: ModuleType) -> None:
    ours = models.low_bit_linear(models.Shape(128, 16), 4, 4, np.random.default_rng(6))  # 1024 bytes and 32 of scales
    seconds = {"ours": 2e-6, "block 32": 5e-6, "block 128": 3e-6}
    one = script.Figures.of(ours, 1, seconds, bandwidth=1e9, peak=None)
    assert one.ratios == pytest.approx({"block 32": 2.5, "block 128": 1.5})
    assert one.read_share == pytest.approx(1056 / 2e-6 / 1e9)
    many = script.Figures.of(ours, 2048, {"ours": 1e-3, "block 32": 4e-3}, bandwidth=None, peak=8.388608e9)
    assert (many.read_share, many.peak_share) == (None, pytest.approx(0.5))
    assert many.ratios == {"block 32": 4.0}
    assert script.Figures.of(ours, 256, seconds, bandwidth=None, peak=1e12).peak_share is None
    assert script.table([one, many], with_peak=True).splitlines()[2].split(" | ") == [
        "| 128, 16", "2.50         ", "1.50          ", "53%              ", "4.00            ", "–                ",
        "50%             |",
    ]  # fmt: skip
    assert "peak" not in script.table([one, many], with_peak=False)


def test_turns_and_quantile(script: ModuleType) -> None:
    calls: list[str] = []
    names = ("a", "b")
    clock = iter(range(1000))
    times = script.take_turns({name: lambda name=name: calls.append(name) for name in names}, lambda: next(clock), 0)
    assert calls == ["a", "b"] * script.LEAST_CALLS
    assert times == {name: [1] * script.LEAST_CALLS for name in names}
    assert script.quantile([3.0, 1.0, 2.0]) == 1.0
    assert script.quantile([float(i) for i in range(30)]) == 2.0


@pytest.mark.skipif(shutil.which("false") is None, reason="no command that fails")
def test_without_a_loop_there_is_a_reason(limits: ModuleType) -> None:
    with limits.PeakLoop("avx2", compiler="no-such-compiler") as peak:
        assert "no-such-compiler" in peak.problem
        assert peak.macs_per_second(1) is None
    with limits.PeakLoop("avx2", compiler="false") as peak:
        assert peak.problem == "false returned 1"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.skipif("avx2" not in ISAS, reason="needs the library and AVX2")
def test_the_loop_runs(limits: ModuleType) -> None:
    with limits.PeakLoop("avx2") as peak:
        assert peak.problem == ""
        assert peak.macs_per_second(1) > 1e9
