"""A model folder in, a verified low-bit model out: every family and every kind of operator, on tiny models."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from bdq_export import export
from bdq_export.errors import UsageError, VerificationError

QUICK: dict[str, Any] = {"calib_samples": 4, "calib_seq_len": 48, "min_top1": 0.0}
PLAIN: dict[str, Any] = {"transform": "none", "weights": "rtn", "min_top1": 0.0}
FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3")

ModelDir = Callable[..., Path]


def _operators(model: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in onnx.load(model, load_external_data=False).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts


def _digests(folder: Path) -> dict[str, str]:
    skipped = {"bdq_report.json", "report.html"}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in skipped
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_8_bit_weights_agree_with_the_float_model(family: str, model_dir: ModelDir, tmp_path: Path) -> None:
    # GroupQueryAttention rotates a multiple of 16 channels; a head of the tiny model has 16
    changes = {"partial_rotary_factor": 1.0} if family == "phi3" else {}
    result = export(
        model_dir(family, **changes), tmp_path / "out", scheme="w8a16", transform="none", weights="rtn", min_top1=0.85
    )
    assert result.metrics["top1_agreement"] >= 0.85
    assert result.metrics["kl"] < 0.02
    operators = _operators(result.paths[0])
    assert "MatMul" not in operators
    assert operators["GroupQueryAttention"] == 3


@pytest.mark.parametrize("transform", ["smooth", "hadamard", "bdq", "auto"])
def test_transforms_keep_8_bit_models_right(transform: str, model_dir: ModelDir, tmp_path: Path) -> None:
    result = export(
        model_dir("llama_biases"),
        tmp_path / "out",
        scheme="w8a16",
        transform=transform,
        **{**QUICK, "min_top1": 0.8},
    )
    assert result.metrics["kl"] < 0.02


def test_more_bits_agree_more(model_dir: ModelDir, tmp_path: Path) -> None:
    directory = model_dir("llama")
    kl = [
        export(directory, tmp_path / scheme, scheme=scheme, transform="none", **QUICK).metrics["kl"]
        for scheme in ("w2a16", "w4a16", "w8a16")
    ]
    assert kl[0] > 4 * kl[1] > 16 * kl[2]


@pytest.mark.parametrize("ops", ["qdq", "qlinear"])
def test_static_w8a8_runs_in_integer_operators(ops: str, model_dir: ModelDir, tmp_path: Path) -> None:
    result = export(
        model_dir("llama3"), tmp_path / "out", scheme="w8a8", ops=ops, transform="none", weights="rtn", **QUICK
    )
    operators = _operators(result.paths[0])
    # 3 layers: packed qkv, o, gate, up, down; lm_head stays weight-only
    assert operators["QLinearMatMul" if ops == "qlinear" else "MatMul"] == 15
    assert operators["MatMulNBits"] == 1
    assert result.metrics["top1_agreement"] > 0.4  # 0.49 where ONNX Runtime saturates: x86 without VNNI


def test_the_same_input_and_seed_give_the_same_bytes(model_dir: ModelDir, tmp_path: Path) -> None:
    directory = model_dir("llama")
    for name in ("a", "b"):
        export(directory, tmp_path / name, transform="auto", seed=3, **QUICK)
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    export(directory, tmp_path / "c", transform="auto", seed=4, **QUICK)
    assert _digests(tmp_path / "a")["model.onnx.data"] != _digests(tmp_path / "c")["model.onnx.data"]
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "a", check=True)


def test_the_folder_says_everything_and_leaks_no_path(model_dir: ModelDir, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "name.onnx"
    out.parent.mkdir()
    export(model_dir("llama"), out, **PLAIN)
    names = {path.name for path in out.parent.iterdir()}
    assert names == {
        "README.md", "SHA256SUMS", "bdq_config.json", "bdq_report.json", "config.json", "genai_config.json",
        "name.onnx", "name.onnx.data", "report.html", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    report = json.loads((out.parent / "bdq_report.json").read_text())
    assert report["verified"] is True
    assert report["verification"]["tokens"] > 0
    assert {stage["name"] for stage in report["stages"]} >= {"read model", "round weights", "verify"}
    for path in out.parent.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    properties = {p.key: p.value for p in onnx.load(out, load_external_data=False).metadata_props}
    assert properties["bdq.scheme"] == "w4a16"
    assert "int8" in properties["bdq.executed_precision"] or "w4a8" in properties["bdq.executed_precision"]


def test_a_failed_verification_keeps_the_files_and_marks_them(model_dir: ModelDir, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="UNVERIFIED"):
        export(model_dir("llama"), tmp_path / "out", scheme="w2a16", transform="none", weights="rtn", min_top1=1.0)
    assert (tmp_path / "out" / "UNVERIFIED").exists()
    assert json.loads((tmp_path / "out" / "bdq_report.json").read_text())["verified"] is False


def test_a_dry_run_estimates_and_writes_nothing(model_dir: ModelDir, tmp_path: Path) -> None:
    result = export(model_dir("llama"), tmp_path / "out", dry_run=True)
    assert result.paths == ()
    assert result.metrics["memory_bytes"] > 0
    assert not (tmp_path / "out").exists()


def test_keep_changes_the_bits_of_what_it_names(model_dir: ModelDir, tmp_path: Path) -> None:
    result = export(
        model_dir("llama3"),
        tmp_path / "out",
        keep=("model.layers.0.self_attn.v_proj=8", "model.layers.1.mlp.*=16"),
        **PLAIN,
    )
    model = onnx.load(result.paths[0], load_external_data=False)
    bits = {
        node.name: next(a.i for a in node.attribute if a.name == "bits")
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    assert bits["model.layers.0.self_attn.v_proj"] == 8
    assert bits["model.layers.1.self_attn.qkv_proj"] == 4
    assert "model.layers.1.mlp.down_proj" not in bits
    assert sum(node.op_type == "MatMul" for node in model.graph.node) == 3


def test_dump_writes_the_graph_after_each_pass(model_dir: ModelDir, tmp_path: Path) -> None:
    export(model_dir("llama"), tmp_path / "out", dump=tmp_path / "dump", **PLAIN)
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names[0] == "00-annotate-linears.txt"
    assert names[-1].endswith("strip-metadata.txt")
    assert "MatMulNBits" in (tmp_path / "dump" / names[-1]).read_text()


def test_an_existing_output_needs_force(model_dir: ModelDir, tmp_path: Path) -> None:
    directory = model_dir("llama")
    export(directory, tmp_path / "out", **PLAIN)
    with pytest.raises(UsageError, match="--force"):
        export(directory, tmp_path / "out", **PLAIN)
    export(directory, tmp_path / "out", force=True, **PLAIN)


def test_logits_of_a_left_padded_batch_are_refused(model_dir: ModelDir, tmp_path: Path) -> None:
    import onnxruntime as ort

    result = export(model_dir("llama"), tmp_path / "out", **PLAIN)
    session = ort.InferenceSession(result.paths[0], providers=["CPUExecutionProvider"])
    feeds: dict[str, Any] = {
        value.name: np.zeros((2, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    feeds["input_ids"] = np.array([[0, 5, 6], [7, 8, 9]])
    feeds["attention_mask"] = np.array([[0, 1, 1], [1, 1, 1]])
    with pytest.raises(Exception, match="left"):
        session.run(["logits"], feeds)
    feeds["attention_mask"] = np.ones((2, 3), np.int64)
    assert session.run(["logits"], feeds)[0].shape == (2, 1, 320)
