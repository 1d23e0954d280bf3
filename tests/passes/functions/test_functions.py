"""Function bodies equal the NumPy reference, in stock ONNX Runtime at every level of optimization and in onnx's
evaluator: bit for bit where docs/ops.md says exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from ops_models import Case, attention_case, linear_case, model_of, run_in_onnxruntime

RNG = np.random.default_rng(0)
LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def _outputs(case: Case, level: str) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return run_in_onnxruntime(model_of(case), case.feeds, options)


def _check(case: Case, tolerance: float = 0.0, levels: tuple[str, ...] = ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL")) -> None:
    """Outputs equal the reference's: all of them exactly, or the first within `tolerance` of its largest number."""
    model, expected = model_of(case), case.reference()
    onnx.checker.check_model(model, full_check=True)
    for found in (ReferenceEvaluator(model).run(None, case.feeds), *(_outputs(case, level) for level in levels)):
        assert [(a.shape, a.dtype) for a in found] == [(a.shape, a.dtype) for a in expected]
        first = 0 if tolerance == 0 else 1
        assert all(np.array_equal(a, b) for a, b in zip(found[first:], expected[first:], strict=True))
        if tolerance:
            assert np.abs(found[0] - expected[0]).max() <= tolerance * np.abs(expected[0]).max()


def _rows(*shape: int, seed: int = 0) -> np.ndarray:
    """Rows of very different sizes, one of them zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10 ** rng.uniform(-4, 4, (*shape[:-1], 1))
    x.reshape(-1, shape[-1])[-1] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("clip", [1.0, 0.5, 0.77])
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_fake_quantization(bits: int, clip: float) -> None:
    _check(Case("DynamicFakeQuantize", {"bits": bits, "clip": clip}, {"x": _rows(50, 33)}), levels=LEVELS)


@pytest.mark.parametrize("size", [1, 2, 16, 64, 128, 1024, 4096])
def test_hadamard(size: int) -> None:
    _check(
        Case("Hadamard", {"size": size}, {"x": _rows(2, 3, max(size, 192) if size <= 64 else 2 * size)}), levels=LEVELS
    )


@pytest.mark.parametrize("shape", [(192,), (5, 192), (2, 3, 192), (2, 1, 3, 192)])
@pytest.mark.parametrize("interleave", [1, 3, 12, 192])
def test_interleaved_hadamard(interleave: int, shape: tuple[int, ...]) -> None:
    x = RNG.standard_normal(shape).astype(np.float32)
    _check(Case("Hadamard", {"size": 64, "interleave": interleave}, {"x": x}), levels=LEVELS)


@pytest.mark.parametrize("interleave", [3, 45])
def test_interleaved_linear(interleave: int) -> None:
    attributes = {"weight_bits": 4, "activation_bits": 4, "hadamard_size": 4, "hadamard_interleave": interleave}
    _check(linear_case("HadamardLowBitLinearBias", _rows(2, 3, 180), 17, **attributes), levels=LEVELS)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (17, 65), (31, 200)])
@pytest.mark.parametrize(("bits", "grid"), [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (8, 0)])
def test_linear_by_channel(bits: int, grid: int, n: int, k: int) -> None:
    case = linear_case("LowBitLinearBias", _rows(2, 3, k), n, weight_bits=bits, weight_grid=grid, activation_bits=8)
    _check(case)


@pytest.mark.parametrize("activation_bits", [3, 4, 8])
def test_linear_with_few_activation_bits_and_a_clip(activation_bits: int) -> None:
    x = _rows(40, 130)
    attributes = {"weight_bits": 4, "activation_bits": activation_bits, "activation_clip": 0.5}
    _check(linear_case("LowBitLinear", x, 50, **attributes), levels=LEVELS)
    attributes["hadamard_size"] = 2
    _check(linear_case("HadamardLowBitLinear", x, 50, **attributes), levels=LEVELS)


def test_eight_bit_weights_and_activations_at_their_limits() -> None:
    """No 16-bit sum of two products may matter: the largest activations meet the largest weights."""
    signs = np.sign(RNG.standard_normal((4, 256))).astype(np.float32)
    case = linear_case("LowBitLinear", signs, 16, weight_bits=8, activation_bits=8)
    weight = np.where(RNG.random(case.inputs["weight"].shape) < 0.5, 0, 255).astype(np.uint8)
    _check(Case(case.operator, case.attributes, {**case.inputs, "weight": weight}))


@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linear_by_block(bits: int, block: int) -> None:
    case = linear_case("LowBitLinear", _rows(3, 300), 20, weight_bits=bits, activation_bits=8, block_size=block)
    _check(case, tolerance=2e-6)


@pytest.mark.parametrize(("bits", "block", "grid"), [(2, 0, 1), (3, 32, 0), (4, 128, 1), (8, 0, 0)])
def test_linear_with_float_activations(bits: int, block: int, grid: int) -> None:
    attributes = {"weight_bits": bits, "weight_grid": grid, "block_size": block, "activation_bits": 16}
    _check(
        linear_case("LowBitLinearBias", RNG.standard_normal((3, 200)).astype(np.float32), 20, **attributes),
        tolerance=2e-6,
    )


@pytest.mark.parametrize("operator", ["GatedLowBitLinear", "GatedLowBitLinearBias", "HadamardGatedLowBitLinearBias"])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_gated_linear(operator: str, gate: str) -> None:
    attributes: dict[str, Any] = {"weight_bits": 3, "activation_bits": 8, "gate": gate}
    if "Hadamard" in operator:
        attributes["hadamard_size"] = 8
    _check(linear_case(operator, RNG.standard_normal((2, 3, 72)).astype(np.float32), 37, **attributes), tolerance=1e-6)


HEADS = {"num_heads": 6, "kv_num_heads": 2, "head_size": 16, "scale": 0.25}
# lengths, tokens of this call, total_sequence_length, positions of the past
PROMPT, PADDED_PROMPT, STEP, BUFFER = ([9], 9, 9, 0), ([5, 9], 9, 9, 0), ([6, 9], 1, 9, 8), ([5, 9], 2, 9, 20)


@pytest.mark.parametrize("text", [PROMPT, PADDED_PROMPT, STEP, BUFFER])
@pytest.mark.parametrize(
    "operator", ["KVAttention", "RotaryKVAttention", "PackedKVAttention", "PackedRotaryKVAttention"]
)
def test_attention(operator: str, text: tuple[list[int], int, int, int]) -> None:
    _check(attention_case(operator, *text, key_bits=4, value_bits=3, **HEADS), tolerance=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        {"hadamard": 1, "rotary_dim": 12},
        {"softcap": 5.0},
        {"local_window_size": 3},
        {"key_clip": 0.5, "value_clip": 0.9},
        {"key_bits": 8, "value_bits": 4},
        {"key_bits": 3, "value_bits": 8},
    ],
)
@pytest.mark.parametrize("text", [PADDED_PROMPT, BUFFER])
def test_attention_with_each_attribute(extra: dict[str, Any], text: tuple[list[int], int, int, int]) -> None:
    attributes = {"key_bits": 4, "value_bits": 4, **HEADS, **extra}
    _check(attention_case("PackedRotaryKVAttention", *text, **attributes), tolerance=1e-6, levels=LEVELS)
