"""Verification must pass a right model and fail a wrong one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_export.errors import UsageError, VerificationError
from bdq_export.scheme import QuantScheme
from bdq_export.verify import Reference, Verification, default_min_top1, torch_reference, verify

TOKENS = np.random.default_rng(7).integers(0, 320, (3, 40))

Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path, toy_weights: Any, toy_model: Any) -> Written:
    def write(seed: int = 0, head_scale: float = 1.0, noise: float = 0.0) -> Path:
        embedding, head = toy_weights(seed)
        head = head * np.float32(head_scale)
        head += np.random.default_rng(1).normal(size=head.shape).astype(np.float32) * np.float32(noise)
        path = tmp_path / "model.onnx"
        ir.save(toy_model(embedding, head), path)
        return path

    return write


@pytest.fixture
def reference(toy_weights: Any) -> Reference:
    embedding, head = toy_weights(0)
    return lambda tokens: embedding[tokens] @ head


def test_same_model_agrees_fully(written: Written, reference: Reference) -> None:
    result = verify(written(), reference, TOKENS, 0.95)
    assert result.top1 == 1.0
    assert abs(result.kl) < 1e-9
    assert result.ppl_quantized == pytest.approx(result.ppl_float, rel=1e-6)
    assert result.tokens == 3 * 39
    assert result.passed


def test_perplexity_is_that_of_the_definition(written: Written, reference: Reference) -> None:
    nll = []
    for window in TOKENS:
        logits = reference(window).astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nll += [-log_p[i, window[i + 1]] for i in range(len(window) - 1)]
    expected = float(np.exp(np.mean(nll)))
    assert verify(written(), reference, TOKENS, 0.5).ppl_float == pytest.approx(expected, rel=1e-9)


def test_one_percent_on_the_weights_shows(written: Written, reference: Reference) -> None:
    same = verify(written(), reference, TOKENS, 0.5)
    scaled = verify(written(head_scale=1.01), reference, TOKENS, 0.5)
    noisy = verify(written(noise=0.1), reference, TOKENS, 0.5)
    assert scaled.kl > 1e-5 > abs(same.kl)
    assert noisy.kl > scaled.kl
    assert noisy.top1 < same.top1


def test_wrong_model_fails_and_says_what_to_do(written: Written, reference: Reference) -> None:
    result = verify(written(seed=1), reference, TOKENS, default_min_top1(QuantScheme.parse("w2a16")))
    assert not result.passed
    with pytest.raises(VerificationError, match="files are kept and marked UNVERIFIED") as error:
        result.require()
    assert error.value.exit_code == 6


def test_graph_with_last_logits_only_is_refused(
    tmp_path: Path, toy_weights: Any, toy_model: Any, reference: Reference
) -> None:
    model = toy_model(*toy_weights(0))
    logits = next(node for node in model.graph if node.op_type == "MatMul")
    value = ir.Value(name="axis1")
    value.const_value = ir.tensor(np.array([-1]), name="axis1")
    model.graph.initializers.add(value)
    last = ir.node("Gather", [logits.inputs[0], value], attributes={"axis": 1})
    model.graph.insert_before(logits, last)
    logits.replace_input_with(0, last.outputs[0])
    ir.save(model, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="exported model"):
        verify(tmp_path / "model.onnx", reference, TOKENS, 0.5)


def test_file_that_does_not_open_is_a_verification_error(tmp_path: Path, reference: Reference) -> None:
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(VerificationError, match="does not open"):
        verify(tmp_path / "model.onnx", reference, TOKENS, 0.5)


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_no_tokens_is_a_usage_error(written: Written, reference: Reference, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        verify(written(), reference, np.zeros(shape, np.int64), 0.5)


def test_torch_reference_gives_all_positions() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    tokens = np.arange(6)
    with torch.no_grad():
        expected = model(torch.arange(6)[None]).logits[0].numpy()
    np.testing.assert_allclose(torch_reference(model)(tokens), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheme", "least"),
    [
        ("w16a16", 0.99),
        ("w8a16", 0.90),
        ("w8a8", 0.63),
        ("w4a16", 0.40),
        ("w4a8", 0.28),
        ("w2a16", 0.05),
        ("w2a4kv16", 0.025),
        ("w4a4kv4", 0.20),
        ("w3a3kv3", 0.10),
    ],
)
def test_default_threshold(scheme: str, least: float) -> None:
    assert default_min_top1(QuantScheme.parse(scheme)) == least


def test_nan_never_passes() -> None:
    assert not Verification(float("nan"), 1.0, 10.0, 10.0, 5, 0.5).passed
