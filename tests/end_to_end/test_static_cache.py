"""A cache with static scales: exported whole, run on stock ONNX Runtime and by genai."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from answers import PROMPT, answer, genai_answer

from bdq_export import export
from bdq_export.commands.inspect import inspect
from bdq_export.errors import MissingDependencyError
from bdq_export.package.config_file import load_config
from bdq_runtime.model import LanguageModel

QUICK: dict[str, Any] = {
    "calib_samples": 4,
    "calib_seq_len": 32,
    "min_top1": 0.0,
    "transform": "none",
    "weights": "rtn",
    "kv_scales": "static",
}


def _export(source: Path, out: Path, scheme: str, **changes: Any) -> tuple[Path, dict[str, Any]]:
    result = export(source, out, scheme=scheme, **{**QUICK, **changes})
    return out, dict(result.metrics)


def _stock(folder: Path, **options: Any) -> LanguageModel:
    return LanguageModel(folder, threads=1, use_library=False, **options)


@pytest.mark.parametrize(
    ("family", "scheme", "executed"),
    [
        ("llama3", "w4a16kv8", "w4a8 in 12 linears, w8a8 in 1 linears, kv8 static in 3 layers"),
        ("qwen3", "w4a8kv8", "w4a8 in 18 linears, w8a8 in 1 linears, kv8 static in 3 layers"),
        ("gemma3", "w8a16kv4", "w8a8 in 19 linears, kv4 static in 3 layers"),
    ],
)
def test_it_is_exported_with_stock_operators_only(
    family: str, scheme: str, executed: str, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    folder, metrics = _export(model_dir(family), tmp_path / "out", scheme)
    assert metrics["executed_precision"] == executed
    assert metrics["kl"] < (0.05 if "w8" in scheme else 1.0)
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert {entry.domain for entry in proto.opset_import} <= {"", "com.microsoft"}
    assert not proto.functions
    bits = int(scheme[-1])
    (cache,) = inspect(folder).caches
    assert (cache.op, cache.count, cache.key_bits, cache.value_bits) == ("GroupQueryAttention", 3, bits, bits)
    assert load_config(folder / "bdq_config.json").kv_scales == "static"
    assert "custom_ops_library" not in (folder / "genai_config.json").read_text()
    model = _stock(folder)
    assert model.shares_cache
    assert answer(model) == answer(_stock(folder, share_cache=False))


def test_a_long_text_outgrows_the_shared_buffer(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """The buffer is allocated anew, of the cache's type, while the text grows token by token."""
    folder, _ = _export(model_dir("mistral"), tmp_path / "out", "w8a16kv8")
    tokens = np.random.default_rng(0).integers(5, 300, 150)
    model = _stock(folder)
    model.append(tokens[:30])
    one_by_one = np.concatenate([model.append([int(token)]).copy() for token in tokens[30:]])
    whole = _stock(folder).append(tokens, all_logits=True)[30:]
    # Sums in another order tip values that lie between two codes over: in few tokens, and not in the middle of them.
    errors = np.abs(one_by_one - whole).max(-1) / whole.std()
    assert np.median(errors) < 0.1


def test_few_bit_linears_go_with_it(model_dir: Callable[..., Path], tmp_path: Path) -> None:
    folder, metrics = _export(model_dir("llama3"), tmp_path / "out", "w4a4kv4", transform="bdq", effort="fast")
    assert metrics["executed_precision"] == "w4a4 in 12 linears, w8a8 in 1 linears, kv4 static in 3 layers"
    used = {node.op_type for node in onnx.load(folder / "model.onnx", load_external_data=False).graph.node}
    assert "GroupQueryAttention" in used
    assert not any(name.endswith("KVAttention") for name in used)
    assert np.isfinite(_stock(folder).append(PROMPT)).all()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["w8a16kv8", "w8a16kv4"])
def test_genai_runs_it(scheme: str, model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Its cache has the types of the model's inputs, int8 and packed uint8, shared between past and present."""
    folder, _ = _export(model_dir("llama3"), tmp_path / "out", scheme)
    assert genai_answer(folder) == answer(_stock(folder))


def test_an_old_onnx_runtime_is_refused_before_the_work(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.26.0")
    with pytest.raises(MissingDependencyError, match=r"needs onnxruntime 1\.27, but 1\.26\.0 is installed"):
        _export(model_dir("llama3"), tmp_path / "out", "w8a16kv8")
    assert not (tmp_path / "out").exists()
