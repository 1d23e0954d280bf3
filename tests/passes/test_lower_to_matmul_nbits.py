"""MatMulNBits computes what the QUANTIZED graph computes, within the tolerance of its kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest

from bdq_passes import AnnotateLinearsPass, InsertWeightQuantizationPass, LowerToMatMulNBitsPass
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec

EXACT, INT8 = 1e-5, 1e-2
BLOCKS = (PerBlock(16), PerBlock(32), PerBlock(64), PerBlock(128), PerBlock(256), PerChannel())
SPECS = [QuantSpec(bits, block, symmetric) for bits in (2, 4, 8) for block in BLOCKS for symmetric in (True, False)]


def _quantized(tiny: Any, weights: Any, expected: int = 3) -> ir.Model:
    AnnotateLinearsPass(expected=3)(tiny.model)
    InsertWeightQuantizationPass(weights, expected=expected)(tiny.model)
    return tiny.model


def _linear(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_float_kernels_equal_quantized(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any, spec: QuantSpec
) -> None:
    graph = tiny(bias=True)
    model = _quantized(graph, quantize_all(graph, spec))
    expected = run(model, {"input_ids": ids})
    assert LowerToMatMulNBitsPass(accuracy_level=0)(model).modified
    for optimize in (False, True):
        error = relative_error(run(model, {"input_ids": ids}, optimize=optimize), expected)
        assert error < (EXACT if spec.bits < 8 else 3 * INT8)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_annotation_says_what_is_executed(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any, spec: QuantSpec
) -> None:
    # One packed linear alone: an int8 kernel is visibly less exact than a float32 one.
    graph = tiny(bias=True)
    weights = {name: weight for name, weight in quantize_all(graph, spec).items() if name in ("a.weight", "b.weight")}
    model = _quantized(graph, weights, expected=1)
    model.graph.outputs[:] = [_linear(model, "relu").outputs[0]]
    expected = run(model, {"input_ids": ids})
    LowerToMatMulNBitsPass(accuracy_level=4)(model)
    for optimize in (False, True):
        error = relative_error(run(model, {"input_ids": ids}, optimize=optimize), expected)
        if note.executed(_linear(model, "ab")) == "float32":
            assert error < EXACT
        else:
            assert 10 * EXACT < error < INT8


def test_a_wrong_scale_is_seen(tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any) -> None:
    spec = QuantSpec(4, PerBlock(16))
    graph, wrong = tiny(), tiny()
    weights = quantize_all(graph, spec)
    expected = run(_quantized(graph, weights), {"input_ids": ids})
    weights["c.weight"] = replace(weights["c.weight"], scales=weights["c.weight"].scales * 1.01)
    model = _quantized(wrong, weights)
    LowerToMatMulNBitsPass(accuracy_level=0)(model)
    assert relative_error(run(model, {"input_ids": ids}), expected) > 100 * EXACT


def test_attributes_and_shapes(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(4, PerBlock(32), symmetric=False)))
    LowerToMatMulNBitsPass()(model)
    node = _linear(model, "c")
    assert (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values == {"K": 40, "N": 48, "bits": 4, "block_size": 32, "accuracy_level": 4}
    # K = 40 takes two blocks of 32; zero points are two nibbles in a byte.
    shapes = [None if value is None else tuple(value.shape or ()) for value in node.inputs[1:]]
    assert shapes == [(48, 2, 16), (48, 2), (48, 1)]
    assert note.parts(node) == ("c",)


def test_g_idx_is_never_given(tiny: Any, quantize_all: Any) -> None:
    graph = tiny(bias=True)
    model = _quantized(graph, quantize_all(graph, QuantSpec(4, PerBlock(32), symmetric=False)))
    LowerToMatMulNBitsPass()(model)
    for node in note.with_role(model, note.LINEAR):
        assert len(node.inputs) < 5 or node.inputs[4] is None


def test_bias_is_folded_in(tiny: Any, quantize_all: Any) -> None:
    graph = tiny(bias=True)
    model = _quantized(graph, quantize_all(graph, QuantSpec(4, PerBlock(16))))
    LowerToMatMulNBitsPass()(model)
    assert "Add" not in [node.op_type for node in model.graph]
    bias = _linear(model, "ab").inputs[5]
    assert bias is not None
    assert bias.name == "ab.bias"


@pytest.mark.parametrize("level", [0, 3, 4])
def test_eight_bits_always_have_the_fast_level(tiny: Any, quantize_all: Any, level: int) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(4, PerBlock(16)), c=QuantSpec(8, PerBlock(16))))
    LowerToMatMulNBitsPass(accuracy_level=level)(model)
    assert _linear(model, "c").attributes["accuracy_level"].value == 4
    assert _linear(model, "ab").attributes["accuracy_level"].value == level


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_bits_without_a_kernel_are_an_error(tiny: Any, quantize_all: Any, bits: int) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(bits, PerBlock(16))))
    with pytest.raises(ValueError, match=f"node ab: {bits} bits, but MatMulNBits has 2, 4, 8"):
        LowerToMatMulNBitsPass()(model)


def test_wrong_accuracy_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="accuracy level is 5, expected 0 to 4"):
        LowerToMatMulNBitsPass(accuracy_level=5)


def test_kept_linear_stays_a_matmul(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    AnnotateLinearsPass(expected=3)(graph.model)
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)), c=None)
    InsertWeightQuantizationPass(weights, expected=2)(graph.model)
    LowerToMatMulNBitsPass()(graph.model)
    assert _linear(graph.model, "c").op_type == "MatMul"


def test_second_run_changes_nothing(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(4, PerBlock(16))))
    LowerToMatMulNBitsPass()(model)
    assert not LowerToMatMulNBitsPass()(model).modified
