"""A model with bdq operators carries a function for each, and no other."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest

from bdq_passes import AttachFunctionsPass, Level, LowerToGatherBlockQuantizedPass, LowerToLowBitLinearPass
from bdq_runtime.opset import VERSION
from bdq_runtime.packing import PerChannel, QuantSpec


def _lowered(quantized: Any) -> ir.Model:
    model: ir.Model = quantized(QuantSpec(4, PerChannel()), bias=True).model
    LowerToLowBitLinearPass(everything=True)(model)
    LowerToGatherBlockQuantizedPass()(model)
    return model


def test_every_operator_gets_its_function(quantized: Any) -> None:
    model = _lowered(quantized)
    assert AttachFunctionsPass()(model).modified
    assert {found.name for found in model.functions.values()} == {"LowBitLinear", "LowBitLinearBias"}
    assert model.opset_imports["bdq"] == VERSION
    onnx.checker.check_model(ir.to_proto(model))


def test_a_second_run_changes_nothing(quantized: Any) -> None:
    model = _lowered(quantized)
    AttachFunctionsPass()(model)
    assert not AttachFunctionsPass()(model).modified


def test_a_stock_model_is_left_alone(quantized: Any) -> None:
    model = quantized(kept=True).model
    assert not AttachFunctionsPass(level=Level.QUANTIZED)(model).modified
    assert "bdq" not in model.opset_imports


def test_an_unknown_operator_is_an_error(quantized: Any) -> None:
    model = _lowered(quantized)
    next(node for node in model.graph if node.op_type == "LowBitLinear").op_type = "LowBitConv"
    with pytest.raises(ir.passes.PreconditionError) as error:
        AttachFunctionsPass()(model)
    assert "no operator LowBitConv" in str(error.value.__cause__)
