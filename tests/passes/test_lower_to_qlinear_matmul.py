"""QLinearMatMul gives the codes of the exact integer product, none different."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import (
    AnnotateLinearsPass,
    InsertActivationQuantizationPass,
    InsertWeightQuantizationPass,
    Level,
    LowerToGatherBlockQuantizedPass,
    LowerToMatMulNBitsPass,
    LowerToQLinearMatMulPass,
    verify,
)
from bdq_passes import annotations as note
from bdq_runtime.packing import QuantSpec

RANGES = {"ab": (-3.0, 4.0, -40.0, 50.0), "c": (0.0, 30.0, -90.0, 70.0)}


@pytest.fixture
def quantized(tiny: Any, quantize_all: Any, channel_int8: QuantSpec) -> tuple[ir.Model, Any]:
    """A graph in QDQ form and its weights."""
    graph = tiny()
    weights = quantize_all(graph, channel_int8)
    AnnotateLinearsPass(expected=3)(graph.model)
    InsertWeightQuantizationPass(weights, expected=3)(graph.model)
    InsertActivationQuantizationPass(RANGES)(graph.model)
    return graph.model, weights


def _affine(low: float, high: float) -> tuple[np.float32, int]:
    scale = np.float32((high - low) / 255)
    return scale, int(np.rint(-low / scale))


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_codes_equal_the_integer_product(
    quantized: tuple[ir.Model, Any], run: Any, ids: Any, optimize: bool, factor: float
) -> None:
    model, weights = quantized
    assert LowerToQLinearMatMulPass()(model).modified
    node = next(node for node in model.graph if node.name == "ab")
    activation = node.inputs[0]
    assert node.op_type == "QLinearMatMul"
    assert activation is not None
    model.graph.outputs[:] = [node.outputs[0], activation]
    found, codes = run(model, {"input_ids": ids}, optimize=optimize)
    (x_scale, x_zero), (y_scale, y_zero) = _affine(-3, 4), _affine(-40, 50)
    both = np.concatenate([weights["a.weight"].codes, weights["b.weight"].codes]).astype(np.int64) - 128
    scales = np.concatenate([weights["a.weight"].scales, weights["b.weight"].scales])[:, 0]
    product = (codes.astype(np.int64) - x_zero) @ both.T
    multiplier = (x_scale * scales / y_scale).astype(np.float32) * np.float32(factor)
    expected = np.clip(np.rint(product.astype(np.float32) * multiplier) + y_zero, 0, 255)
    # The negative control: one percent on the scale is many codes.
    assert (np.abs(found - expected).max() == 0) == (factor == 1.0)


def test_all_but_the_linears_with_ranges_lower_elsewhere(
    quantized: tuple[ir.Model, Any], run: Any, ids: Any, relative_error: Any
) -> None:
    model, _ = quantized
    expected = run(model, {"input_ids": ids})
    LowerToQLinearMatMulPass()(model)
    LowerToMatMulNBitsPass()(model)
    LowerToGatherBlockQuantizedPass()(model)
    verify(model, Level.LOWERED)
    kinds = [node.op_type for node in note.with_role(model, note.LINEAR)]
    assert kinds == ["QLinearMatMul", "QLinearMatMul", "MatMulNBits"]
    assert {note.executed(node) for node in note.with_role(model, note.LINEAR)} == {"int8"}
    for optimize in (False, True):
        assert relative_error(run(model, {"input_ids": ids}, optimize=optimize), expected) < 2e-2


def test_matmul_nbits_leaves_static_activations_alone(quantized: tuple[ir.Model, Any]) -> None:
    model, _ = quantized
    LowerToMatMulNBitsPass()(model)
    assert [node.op_type for node in note.with_role(model, note.LINEAR)] == ["MatMul", "MatMul", "MatMulNBits"]


def test_second_run_changes_nothing(quantized: tuple[ir.Model, Any]) -> None:
    model, _ = quantized
    LowerToQLinearMatMulPass()(model)
    assert not LowerToQLinearMatMulPass()(model).modified


def test_missing_quantizer_is_an_error(quantized: tuple[ir.Model, Any]) -> None:
    model, _ = quantized
    node = next(node for node in model.graph if node.name == "c")
    node.outputs[0].consumers()[0].op_type = "Relu"
    with pytest.raises(ValueError, match="node c: between DequantizeLinear and Relu"):
        LowerToQLinearMatMulPass()(model)
