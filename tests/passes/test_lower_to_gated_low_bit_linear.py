"""A gated MLP becomes one operator, and computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import InsertOnlineTransformsPass, InsertTokenQuantizationPass, LowerToGatedLowBitLinearPass
from bdq_passes import annotations as note
from bdq_passes.functions import attach_functions
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec
from bdq_runtime.specs import ActivationQuantization, OnlineTransform

GATED = "mlp.gate_up_proj"


def _prepared(make: Any, bits: int = 4, online: bool = False, **options: Any) -> ir.Model:
    model: ir.Model = make(**options)
    if online:
        diagonal = np.linspace(0.5, 2, 48).astype(np.float32)
        InsertOnlineTransformsPass({GATED: OnlineTransform(16, diagonal, interleave=3)})(model)
    if bits < 16:
        InsertTokenQuantizationPass({GATED: ActivationQuantization(bits, 0.9)})(model)
    return model


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("spec", [QuantSpec(3, PerChannel()), QuantSpec(4, PerBlock(32))], ids=["w3", "w4b32"])
def test_the_same_function(
    mlp_quantized: Any, run: Any, hidden: Any, activation: str, bias: bool, online: bool, spec: QuantSpec
) -> None:
    # 40 channels: the second panel of each half is half empty
    options = {"activation": activation, "bias": bias, "online": online, "spec": spec}
    before, after = _prepared(mlp_quantized, **options), _prepared(mlp_quantized, **options)
    LowerToGatedLowBitLinearPass(expected=1)(after)
    for model in (before, after):
        attach_functions(model)
    found, expected = run(after, {"x": hidden}), run(before, {"x": hidden})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    name = f"{'Hadamard' if online else ''}GatedLowBitLinear{'Bias' if bias else ''}"
    assert [node.op_type for node in note.with_role(after, note.LINEAR)] == [name, "MatMul"]
    assert not {"Split", "Sigmoid", "Gelu", "Mul", "Add"} & {node.op_type for node in after.graph}


def test_stock_linears_are_left_alone(mlp_quantized: Any) -> None:
    model = _prepared(mlp_quantized, bits=16)
    assert not LowerToGatedLowBitLinearPass(expected=0)(model).modified
    LowerToGatedLowBitLinearPass(expected=1, everything=True)(model)
    node = next(note.with_role(model, note.LINEAR))
    assert (note.executed(node), node.attributes["activation_bits"].as_int()) == ("float32", 16)


def test_another_reader_of_the_gate_forbids_it(mlp_quantized: Any) -> None:
    model = _prepared(mlp_quantized)
    split = next(node for node in model.graph if node.op_type == "Split")
    extra = ir.node("Relu", [split.outputs[0]], name="extra")
    model.graph.append(extra)
    extra.outputs[0].name = "extra"
    model.graph.outputs.append(extra.outputs[0])
    with pytest.raises(ValueError, match="0 gated MLPs were lowered to one operator, expected 1"):
        LowerToGatedLowBitLinearPass(expected=1)(model)


def test_linears_that_were_not_merged_are_an_error(mlp_quantized: Any) -> None:
    with pytest.raises(ValueError, match="0 gated MLPs were lowered to one operator, expected 1"):
        LowerToGatedLowBitLinearPass(expected=1, everything=True)(mlp_quantized(merged=False))
