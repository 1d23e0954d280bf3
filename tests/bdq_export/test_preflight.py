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
LLAMA_70B = Dimensions(8192, 80, 64, 8, 128, 28672, 128256, False, 128, 131072, None)
PARAMETERS_70B = 70_553_706_496
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


@pytest.mark.parametrize(("block", "scales"), [("channel", 5184), (32, 18 * 5184 + 30 * 576)])
def test_what_is_learned_of_all_blocks(block, scales):
    """One block at a time, scales of rows or of their blocks and what learns them stay, and codes of no weight do."""
    options = ExportOptions(scheme="w4a4kv4", calib_samples=32, block_size=0 if block == "channel" else block)
    learned, fast = (
        estimate(SMOLLM2, PARAMETERS, replace(options, effort=effort), True).memory_bytes
        for effort in ("standard", "fast")
    )
    numbers = 30 * (scales + 3 * 576 + 1536 + 4 * 576)
    states, inputs = 2 * 32 * 512 * 576, 8 * 512 * 30 * 576
    gradient = 8 * 4 * 128 * 49152 + 8 * 512 * (20 * 576 + 8 * 1536)
    assert learned - fast == 20 * numbers + states + inputs + gradient
    whole = estimate(SMOLLM2, PARAMETERS, options).memory_bytes
    assert whole - estimate(SMOLLM2, PARAMETERS, replace(options, effort="fast")).memory_bytes > 2 * PARAMETERS


@pytest.mark.parametrize(
    "options",
    [{"scheme": "w4a4kv4"}, {"scheme": "w4a4kv4", "effort": "fast"}, {"scheme": "w3a3kv3", "effort": "best"}],
    ids=str,
)
def test_70b_is_a_matter_of_disk(options):
    """At the default effort, too: about 100 GB, of which what is learned of all blocks is a few."""
    need = estimate(LLAMA_70B, PARAMETERS_70B, ExportOptions(**options), True)
    assert need.memory_bytes < 128e9
    assert estimate(LLAMA_70B, PARAMETERS_70B, ExportOptions(**options)).memory_bytes > 600e9


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
    with pytest.raises(ResourceError, match=r"needs about 1\.6 GB of memory, .* but 1\.6 GB are available"):
        check_resources(checkpoint, tmp_path / "out.onnx", PLAIN)


@pytest.mark.parametrize(
    ("options", "spare", "words"),
    [
        ({"scheme": "w4a4kv4"}, {"effort": "fast"}, ", use --effort fast, or"),
        (
            {"scheme": "w4a4kv4", "loss": "rce", "loss_delta": 0.3},
            {"effort": "fast", "loss": "kl"},
            ", use --effort fast,",
        ),
        (
            {"scheme": "w4a4kv4"},
            {"transform": "none", "weights": "rtn"},
            "--effort fast --transform none --weights rtn",
        ),
        ({"scheme": "w4a16"}, {"transform": "none", "weights": "rtn"}, ", use --transform none --weights rtn, or"),
        ({"scheme": "w4a16"}, None, "close other programs, or take a larger machine"),
    ],
    ids=str,
)
def test_what_would_fit_is_named(tmp_path, monkeypatch, options, spare, words):
    """That weights may be held one block at a time needs no saying: it is done already."""
    checkpoint = SimpleNamespace(dimensions=LLAMA_70B, parameters=PARAMETERS_70B)
    options = ExportOptions(**options)
    fits = 10**9
    if spare is not None:
        fits = estimate(LLAMA_70B, PARAMETERS_70B, replace(options, loss_delta=0.5, **spare), True).memory_bytes
    set_free(monkeypatch, fits, 1 << 60)
    with pytest.raises(ResourceError, match="with the weights of one block at a time") as refusal:
        check_resources(checkpoint, tmp_path / "out.onnx", options)
    assert words in str(refusal.value)
    assert "low-memory" not in str(refusal.value)


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
