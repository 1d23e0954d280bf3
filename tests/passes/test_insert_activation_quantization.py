"""Static activations: the QDQ form computes what the affine codes say."""

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
    verify,
)
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, QuantSpec

RANGES = {"ab": (-3.0, 4.0, -40.0, 50.0), "c": (0.0, 30.0, -90.0, 70.0)}


def _quantized(graph: Any, weights: Any) -> ir.Model:
    AnnotateLinearsPass(expected=3)(graph.model)
    InsertWeightQuantizationPass(weights, expected=3)(graph.model)
    return graph.model


def _fake(values: Any, low: float, high: float) -> Any:
    scale = np.float32((high - low) / 255)
    zero = np.rint(-low / scale)
    return (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * np.float64(scale)


@pytest.mark.parametrize("bias", [False, True])
def test_equals_fake_quantization(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any, channel_int8: QuantSpec, bias: bool
) -> None:
    graph = tiny(bias=bias)
    weights = quantize_all(graph, channel_int8)
    model = _quantized(graph, weights)
    assert InsertActivationQuantizationPass(RANGES)(model).modified
    wide = {name: weight.dequantize().astype(np.float64) for name, weight in weights.items()}
    hidden = _fake(wide["model.embed_tokens.weight"][ids], -3, 4)
    added = graph.biases.get("ab", np.zeros(1))
    low, high = (-40 - added.max(), 50 - added.min()) if bias else (-40, 50)
    packed = _fake(hidden @ np.concatenate([wide["a.weight"], wide["b.weight"]]).T, float(low), float(high))
    inner = _fake(_fake(np.maximum(packed + added, 0), 0, 30) @ wide["c.weight"].T, -90, 70)
    expected = np.maximum(inner, 0) @ wide["model.embed_tokens.weight"].T
    found = run(model, {"input_ids": ids})
    # A code at a rounding boundary may fall on either side: few may differ, and none by more than its step makes.
    different = np.abs(found - expected) > 1e-5 * np.abs(expected).max()
    assert different.mean() < 0.05
    assert relative_error(found, expected) < 0.02
    assert relative_error(found * 1.01, expected) > 0.005


def test_weights_become_signed(tiny: Any, quantize_all: Any, channel_int8: QuantSpec) -> None:
    graph = tiny()
    weights = quantize_all(graph, channel_int8)
    model = _quantized(graph, weights)
    InsertActivationQuantizationPass(RANGES)(model)
    tensor = model.graph.initializers["c.weight_codes_int8"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy().astype(int), weights["c.weight"].codes.T.astype(int) - 128)
    assert "c.weight_codes" not in model.graph.initializers


def test_readers_of_one_tensor_share_the_pair(tiny: Any, quantize_all: Any, channel_int8: QuantSpec) -> None:
    from bdq_passes import SplitMixedLinearsPass

    graph = tiny()
    AnnotateLinearsPass(expected=3)(graph.model)
    mixed = {"a.weight": channel_int8}
    SplitMixedLinearsPass(mixed, {"a.weight": 24, "b.weight": 16})(graph.model)
    InsertWeightQuantizationPass(quantize_all(graph, channel_int8), expected=4)(graph.model)
    InsertActivationQuantizationPass({"a": RANGES["ab"], "b": RANGES["ab"]})(graph.model)
    nodes = {node.name: node for node in graph.model.graph}
    assert nodes["a"].inputs[0] is nodes["b"].inputs[0]


@pytest.mark.parametrize("optimize", [False, True])
def test_zero_range_runs(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, channel_int8: QuantSpec, optimize: bool
) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, channel_int8))
    InsertActivationQuantizationPass({"c": (0.0, 0.0, 0.0, 0.0)})(model)
    assert np.isfinite(run(model, {"input_ids": ids}, optimize=optimize)).all()


def test_second_run_changes_nothing(tiny: Any, quantize_all: Any, channel_int8: QuantSpec) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, channel_int8))
    InsertActivationQuantizationPass(RANGES)(model)
    assert not InsertActivationQuantizationPass(RANGES)(model).modified
    verify(model, Level.QUANTIZED)
    assert [node.name for node in model.graph if note.has_static_activations(node)] == ["ab", "c"]


@pytest.mark.parametrize("bounds", [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_bad_range_is_an_error(
    tiny: Any, quantize_all: Any, channel_int8: QuantSpec, bounds: tuple[float, float]
) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, channel_int8))
    with pytest.raises(ValueError, match=r"linear c: activation range .* is not a finite range"):
        InsertActivationQuantizationPass({"c": (*bounds, 0.0, 1.0)})(model)


def test_unknown_linear_is_an_error(tiny: Any, quantize_all: Any, channel_int8: QuantSpec) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, channel_int8))
    with pytest.raises(ValueError, match="1 ranges have no linear in the graph, the first is d"):
        InsertActivationQuantizationPass({"d": (0.0, 1.0, 0.0, 1.0)})(model)


def test_block_scales_are_an_error(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(8, PerBlock(16))))
    with pytest.raises(ValueError, match=r"node c: weights are .* static activations need"):
        InsertActivationQuantizationPass({"c": RANGES["c"]})(model)
