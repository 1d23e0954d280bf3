"""Schemes that no stock operator computes: exported whole, run with the op library, without it, and by genai."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from answers import PROMPT, answer, genai_answer
from contrib_operators import GatherBlockQuantized, SkipSimplifiedLayerNormalization
from onnx.reference import ReferenceEvaluator

from bdq_export import export
from bdq_export.calibration import learned_scales
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.commands.inspect import inspect
from bdq_export.errors import UsageError
from bdq_export.learning import block_stage
from bdq_runtime.library import LibraryError, library_path
from bdq_runtime.model import LanguageModel
from bdq_runtime.opset import VERSION
from bdq_runtime.session import create_session

QUICK: dict[str, Any] = {
    "calib_samples": 4,
    "calib_seq_len": 32,
    "min_top1": 0.0,
    "transform": "none",
    "weights": "rtn",
}
CONTRIB = (GatherBlockQuantized, SkipSimplifiedLayerNormalization)


def _export(source: Path, out: Path, scheme: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    name, _, ops = scheme.partition(" ")
    result = export(source, out, scheme=name, ops=ops or "auto", **{**QUICK, **changes})
    return out, dict(result.metrics)


def _learned(folder: Path) -> tuple[float, float]:
    """Held-out losses of the torch model after the learned stage and before it, as the report has them."""
    notes = " ".join(json.loads((folder / "bdq_report.json").read_text())["notes"])
    found = re.search(r"learned end to end in (\d+) steps: held-out loss ([\d.]+) nats, ([\d.]+) before", notes)
    assert found is not None, notes
    return float(found[2]), float(found[3])


@pytest.mark.parametrize("scheme", ["w4a8kv8", "w2a16"])
def test_the_written_file_is_what_was_learned(
    scheme: str, model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales, diagonals, gains and clips reach the file: its loss is the one that the torch model ended with.

    So few sequences that the one held out both judges the learning and verifies the file.
    """
    monkeypatch.setattr(learned_scales, "_SMALL_RATE", 3e-3)  # so few steps change little at a small one
    monkeypatch.setattr(learned_scales, "_EPOCHS", {"best": 6})
    # The verification leaves out the last of the 32 tokens, which is up to 3 % of the loss: here, too.
    every = HeldOutLoss._normed
    monkeypatch.setattr(HeldOutLoss, "_normed", lambda self: every(self)[:-1])
    options = {"weights": "gptq", "effort": "best", "transform": "bdq", "calib_samples": 7}
    out, metrics = _export(model_dir("llama"), tmp_path / "out", scheme, **options)
    after, before = _learned(out)
    assert after < 0.98 * before, "learning gained too little to tell whether it is in the file"
    assert metrics["kl"] == pytest.approx(after, rel=0.01)


def _unread(proto: onnx.ModelProto) -> set[str]:
    """Weights that no node reads; ONNX Runtime warns of each of them."""
    read = {name for node in proto.graph.node for name in node.input}
    return {weight.name for weight in proto.graph.initializer} - read


def _reference_answer(folder: Path, count: int = 8) -> list[int]:
    """From the functions in the file, run by onnx."""
    proto = onnx.load(folder / "model.onnx")
    model = ReferenceEvaluator(proto, new_ops=[*CONTRIB])
    past = {}
    for value in proto.graph.input:
        if value.name.startswith("past"):
            _, heads, _, row = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
            past[value.name] = np.zeros((1, heads, 0, row), np.uint8)
    tokens: list[int] = []
    fed = PROMPT
    for step in range(count):
        length = len(PROMPT) + step
        feeds = {"input_ids": np.array([fed], np.int64), "attention_mask": np.ones((1, length), np.int64), **past}
        logits, *present = model.run(None, feeds)
        past = dict(zip(past, present, strict=True))
        tokens.append(int(logits[0, -1].argmax()))
        fed = tokens[-1:]
    return tokens


@pytest.mark.parametrize(
    ("scheme", "executed"),
    [
        ("w4a4kv4", "w4a4 in 12 linears, w8a8 in 1 linears, kv4 in 3 layers"),
        ("w3a3kv3", "w3a3 in 12 linears, w8a8 in 1 linears, kv3 in 3 layers"),
        ("w2a4", "w2a4 in 12 linears, w8a8 in 1 linears"),
        ("w4a8 bdq", "w4a8 in 12 linears, w8a8 in 1 linears"),
        ("w16a4", "w32a4 in 15 linears, w32a8 in 1 linears"),
        ("w3a16", "w3a32 in 12 linears, w8a8 in 1 linears"),
        ("w4a16kv8", "w4a8 in 12 linears, w8a8 in 1 linears, kv8 in 3 layers"),
    ],
)
def test_a_scheme_is_exported_and_runs_without_the_library(
    scheme: str, executed: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    nothing_to_calibrate = {"calib_samples": None, "calib_seq_len": None} if scheme == "w3a16" else {}
    source = model_dir("llama3", tie_word_embeddings=True)
    folder, metrics = _export(source, tmp_path / "out", scheme, **nothing_to_calibrate)
    assert metrics["executed_precision"] == executed
    assert np.isfinite(metrics["ppl_quantized"])
    assert inspect(folder).metadata["bdq.executed_precision"] == executed
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    used = {node.op_type for node in proto.graph.node if node.domain == "bdq"}
    assert used == {function.name for function in proto.functions}
    assert {entry.key: entry.value for entry in proto.metadata_props}["bdq.operators_version"] == str(VERSION)
    assert _unread(proto) == set()
    session = create_session(folder / "model.onnx", use_library=False)
    assert session.get_outputs()[0].shape[1:] == [1, 320]


@pytest.mark.parametrize("scheme", ["w4a4kv4", pytest.param("w3a3kv3", marks=pytest.mark.slow)])
def test_the_file_gives_the_same_tokens_everywhere(scheme: str, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """On the op library, on ONNX Runtime without it, and in onnx's own evaluator."""
    folder, _ = _export(model_dir("llama3"), tmp_path / "out", scheme, transform="bdq")
    expected = _reference_answer(folder)
    assert len(set(expected)) > 2
    assert answer(LanguageModel(folder, use_library=False)) == expected
    try:
        library_path()
    except LibraryError:
        return
    assert answer(LanguageModel(folder, use_library=True)) == expected


@pytest.mark.slow  # where continuous integration has installed onnxruntime-genai
def test_genai_runs_it_with_and_without_the_library(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """The cache is uint8 and its rows are not of the head size, shared between past and present."""
    folder, _ = _export(model_dir("llama3"), tmp_path / "out", "w4a4kv4")
    config = json.loads((folder / "genai_config.json").read_text())
    expected = answer(LanguageModel(folder))
    assert LanguageModel(folder).shares_cache
    assert config["search"]["past_present_share_buffer"]
    try:
        library = library_path()
    except LibraryError:
        assert "custom_ops_library" not in config["model"]["decoder"]["session_options"]
    else:
        assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == library.name
        assert genai_answer(folder) == expected
        plain = Path(shutil.copytree(folder, tmp_path / "plain"))
        del config["model"]["decoder"]["session_options"]["custom_ops_library"]
        (plain / "genai_config.json").write_text(json.dumps(config))
        folder = plain
    assert genai_answer(folder) == expected


def test_online_transforms_are_compared_with_the_right_model(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Weights folded for online transforms are another model without them: not the one to compare with."""
    source = model_dir("llama3")
    _, none = _export(source, tmp_path / "none", "w8a8 bdq")
    _, online = _export(source, tmp_path / "online", "w8a8 bdq", transform="bdq")
    assert online["ppl_float"] == pytest.approx(none["ppl_float"], rel=1e-4)
    assert online["kl"] < 0.1  # 24 nats against the wrong one


def test_flatquant_is_exported_with_stock_operators_in_front(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file computes what the torch model did, scales learned on top or not; no transform counts as a linear."""
    monkeypatch.setattr(block_stage, "_FLATQUANT_STEPS", 16)
    options = {"weights": "gptq", "effort": "best", "transform": "kronecker", "calib_samples": 7}
    folder, metrics = _export(model_dir("llama3"), tmp_path / "out", "w4a8kv8 bdq", **options)
    # No integer grid makes these sums exact, as that of Hadamard transforms does.
    assert metrics["kl"] == pytest.approx(min(_learned(folder)), rel=0.03)
    assert metrics["executed_precision"] == "w4a8 in 12 linears, w8a8 in 1 linears, kv8 in 3 layers"
    assert metrics["transform"] == "kronecker"
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    linears = {node.op_type for node in graph.node if "LowBitLinear" in node.op_type}
    assert linears == {"GatedLowBitLinear", "LowBitLinear"}
    products = [node.name for node in graph.node if node.op_type == "MatMul" and "multiply" in node.name]
    assert len(products) == 3 * (4 * 2 - 1)
    assert inspect(folder).role_bytes["online transforms"] > 0
    session = create_session(folder / "model.onnx", use_library=False)
    assert session.get_outputs()[0].shape[1:] == [1, 320]


def test_a_custom_operator_needs_whole_heads(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """What the cache's rows cannot hold is said before the work starts."""
    from bdq_export.errors import UsageError

    source = model_dir("llama", hidden_size=36, num_attention_heads=9, head_dim=4)
    with pytest.raises(UsageError, match=r"head size 4: .* multiple of 8"):
        _export(source, tmp_path / "out", "w4a16kv4")


def test_learned_rotations_are_exported(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    options = {"transform": "spin", "weights": "gptq", "effort": "fast"}
    out, metrics = _export(model_dir("llama", tie_word_embeddings=False), tmp_path / "out", "w8a8kv8 bdq", **options)
    assert metrics["transform"] == "spin"
    assert metrics["kl"] < 0.05
    notes = " ".join(json.loads((out / "bdq_report.json").read_text())["notes"])
    assert re.search(r"learned rotations lose [\d.]+ nats on held-out tokens with float weights, [\d.]+ before", notes)


def test_learned_rotations_are_refused_where_norms_do_not_commute(
    model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="its norms do not commute with a residual rotation; use --transform hadamard"):
        export(model_dir("gemma3"), tmp_path / "out", scheme="w4a4kv4", transform="spin", dry_run=True)
