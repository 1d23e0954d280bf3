"""Pre-flight checks: a documented estimate, refusals that name both sizes, OUT kept apart from the model."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from bdq_export import preflight
from bdq_export.errors import InvalidInputError, ResourceError
from bdq_export.options import ExportOptions
from bdq_export.preflight import check_resources, check_separate, estimate
from bdq_models import Dimensions

SMOLLM2 = Dimensions(576, 30, 9, 3, 64, 1536, 49152, True, 64, 8192, None)
PARAMETERS = 134_515_008
PLAIN = ExportOptions(transform="none", weights="rtn")
CALIBRATED = {"calib_samples": 32, "calib_seq_len": 512}


def test_formula():
    embedding = 49152 * 576
    plain = estimate(SMOLLM2, PARAMETERS, PLAIN)
    assert plain.memory_bytes == 700_000_000 + 9 * PARAMETERS + 8 * 512 * 49152
    gptq = estimate(SMOLLM2, PARAMETERS, replace(PLAIN, weights="gptq", **CALIBRATED))
    assert gptq.memory_bytes - plain.memory_bytes == 12 * 32 * 512 * 576 + 48 * 1536**2
    folded = estimate(SMOLLM2, PARAMETERS, replace(PLAIN, transform="auto", **CALIBRATED))
    assert folded.memory_bytes - plain.memory_bytes == 4 * PARAMETERS + 4 * embedding + 12 * 32 * 512 * 576
    assert plain.disk_bytes == 4 * PARAMETERS + 6 * embedding + PARAMETERS // 2 + PARAMETERS // 8 + 64_000_000


def test_learning_needs_more_memory():
    """SmolLM2-135M at w3a3kv3 with defaults peaked at 3.82e9 bytes in the learned stage."""
    fast, learned = (
        estimate(SMOLLM2, PARAMETERS, ExportOptions(scheme="w3a3kv3", effort=effort, calib_samples=64)).memory_bytes
        for effort in ("fast", "standard")
    )
    assert learned - fast > 2 * PARAMETERS + 2 * 64 * 512 * 576
    assert learned == pytest.approx(3.82e9, rel=0.05)


def test_more_bits_need_more_disk():
    sizes = [
        estimate(SMOLLM2, PARAMETERS, replace(PLAIN, scheme=scheme)).disk_bytes
        for scheme in ("w2a16", "w4a16", "w8a16")
    ]
    assert sizes == sorted(set(sizes))


@pytest.fixture
def checkpoint():
    return SimpleNamespace(dimensions=SMOLLM2, parameters=PARAMETERS)


def set_free(monkeypatch, memory, disk):
    monkeypatch.setattr(preflight, "available_memory", lambda: memory)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=disk))


def test_enough(checkpoint, tmp_path, monkeypatch):
    need = estimate(SMOLLM2, PARAMETERS, PLAIN)
    set_free(monkeypatch, need.memory_bytes, need.disk_bytes)
    assert check_resources(checkpoint, tmp_path / "new" / "out.onnx", PLAIN) == need
    set_free(monkeypatch, None, need.disk_bytes)
    check_resources(checkpoint, tmp_path / "out.onnx", PLAIN)


def test_block_by_block_formula():
    """A block at a time: 24 bytes a parameter of a block instead of 9 of all, and disk instead."""
    embedding = 49152 * 576
    whole, blocks = (estimate(SMOLLM2, PARAMETERS, PLAIN, streamed) for streamed in (False, True))
    assert (whole.streamed, blocks.streamed) == (False, True)
    block = (PARAMETERS - embedding) / 30
    expected = 700_000_000 + 8 * 512 * 49152 + 24 * block + 20 * embedding + PARAMETERS / 2
    assert blocks.memory_bytes == pytest.approx(expected, abs=2)
    assert blocks.disk_bytes - whole.disk_bytes == pytest.approx(4.5 * PARAMETERS, abs=2)
    given = estimate(SMOLLM2, PARAMETERS, replace(PLAIN, calib="text.txt"), True)
    assert blocks.disk_bytes - given.disk_bytes == 2 * PARAMETERS
    learned = ExportOptions(scheme="w4a4kv4", calib_samples=32)
    fast = replace(learned, effort="fast")
    more = [estimate(SMOLLM2, PARAMETERS, each, True).memory_bytes for each in (learned, fast)]
    assert more[0] - more[1] > 6 * PARAMETERS


def test_70b_is_a_matter_of_disk():
    llama = Dimensions(8192, 80, 64, 8, 128, 28672, 128256, False, 128, 131072, None)
    options = ExportOptions(scheme="w4a4kv4", effort="fast", calib="text.txt")
    need = estimate(llama, 70_553_706_496, options, True)
    assert need.memory_bytes < 128e9 < 600e9 < estimate(llama, 70_553_706_496, options).memory_bytes


def test_less_memory_means_block_by_block(checkpoint, tmp_path, monkeypatch):
    whole, blocks = (estimate(SMOLLM2, PARAMETERS, PLAIN, streamed) for streamed in (False, True))
    out = tmp_path / "out.onnx"
    for memory in (whole.memory_bytes - 1, blocks.memory_bytes):
        set_free(monkeypatch, memory, 1 << 50)
        assert check_resources(checkpoint, out, PLAIN) == blocks
    for memory in (None, whole.memory_bytes):
        set_free(monkeypatch, memory, 1 << 50)
        assert check_resources(checkpoint, out, PLAIN) == whole
        assert check_resources(checkpoint, out, PLAIN, low_memory=True) == blocks


def test_not_enough_memory(checkpoint, tmp_path, monkeypatch):
    set_free(monkeypatch, estimate(SMOLLM2, PARAMETERS, PLAIN, streamed=True).memory_bytes - 1, 1 << 50)
    with pytest.raises(ResourceError, match=r"needs about 1\.6 GB of memory but 1\.6 GB are available"):
        check_resources(checkpoint, tmp_path / "out.onnx", PLAIN)


def test_not_enough_disk(checkpoint, tmp_path, monkeypatch):
    set_free(monkeypatch, None, 100_000_000)
    with pytest.raises(ResourceError, match=r"on the disk of .* but 0\.1 GB are free"):
        check_resources(checkpoint, tmp_path / "out.onnx", PLAIN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("model/out.onnx", "inside the model folder"),
        ("model", "inside the model folder"),
        ("model/sub", "inside the model folder"),
        ("model/sub/deep/out.onnx", "inside the model folder"),
        ("link/out.onnx", "inside the model folder"),
        (".", "holds the model"),
    ],
)
def test_out_and_model_mixed(tmp_path, monkeypatch, out, words):
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=words):
        check_separate(tmp_path / "model", tmp_path / out)


@pytest.mark.parametrize("out", ["out.onnx", "out", "model2/out.onnx", "model.onnx"])
def test_out_and_model_apart(tmp_path, out):
    (tmp_path / "model").mkdir()
    check_separate(tmp_path / "model", tmp_path / out)


def test_cgroup(tmp_path):
    assert preflight._cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.stat").write_text("anon 200\ninactive_file 50\n")
    assert preflight._cgroup_memory(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    assert preflight._cgroup_memory(tmp_path) == 750


def test_available_memory():
    assert preflight.available_memory() > 1 << 20
