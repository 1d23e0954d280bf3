"""Linears become bdq operators, and compute what the graph before computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import (
    InsertOnlineTransformsPass,
    InsertTokenQuantizationPass,
    Level,
    LowerToGatherBlockQuantizedPass,
    LowerToLowBitLinearPass,
    LowerToMatMulNBitsPass,
    verify,
)
from bdq_passes import annotations as note
from bdq_passes.functions import attach_functions
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec
from bdq_runtime.specs import ActivationQuantization, OnlineTransform

NAMES = ("ab", "c", "lm_head")
DIAGONAL = np.linspace(0.5, 2, 48).astype(np.float32)
SPECS = [QuantSpec(bits, PerChannel()) for bits in (2, 3, 4, 8)]
SPECS += [QuantSpec(3, PerBlock(32)), QuantSpec(4, PerBlock(64)), QuantSpec(2, PerChannel(), grid="odd")]


def _prepare(model: ir.Model, bits: int, online: bool, runs: int = 1) -> None:
    if online:
        transforms = {
            "ab": OnlineTransform(16, DIAGONAL, interleave=runs),
            "lm_head": OnlineTransform(8, interleave=runs),
        }
        InsertOnlineTransformsPass(transforms)(model)
    if bits < 16:
        InsertTokenQuantizationPass({name: ActivationQuantization(bits, 0.9) for name in NAMES})(model)


def _run(run: Any, model: ir.Model, ids: Any) -> Any:
    attach_functions(model)
    return run(model, {"input_ids": ids})


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"w{s.bits}-{s.grid}-{type(s.granularity).__name__}")
@pytest.mark.parametrize("bits", [4, 16])
def test_the_same_function(quantized: Any, run: Any, ids: Any, relative_error: Any, spec: QuantSpec, bits: int) -> None:
    before, after = quantized(spec, bias=True).model, quantized(spec, bias=True).model
    for model in (before, after):
        _prepare(model, bits, online=False)
    assert LowerToLowBitLinearPass(everything=True)(after).modified
    assert relative_error(_run(run, after, ids), _run(run, before, ids)) < 1e-5
    assert {node.op_type for node in note.with_role(after, note.LINEAR)} == {"LowBitLinear", "LowBitLinearBias"}


@pytest.mark.parametrize("runs", [1, 3])
def test_transforms_are_taken_in(quantized: Any, run: Any, ids: Any, relative_error: Any, runs: int) -> None:
    spec = QuantSpec(4, PerChannel())
    before, after = quantized(spec, tied=False).model, quantized(spec, tied=False).model
    for model in (before, after):
        _prepare(model, 8, online=True, runs=runs)
    LowerToLowBitLinearPass()(after)
    first, middle, last = note.with_role(after, note.LINEAR)
    assert [node.op_type for node in (first, middle, last)] == [
        "HadamardLowBitLinear",
        "LowBitLinear",
        "HadamardLowBitLinear",
    ]
    assert [node.attributes["hadamard_interleave"].as_int() for node in (first, last)] == [runs, runs]
    assert not {"Hadamard", "DynamicFakeQuantize", "MatMul", "Transpose"} & {node.op_type for node in after.graph}
    assert relative_error(_run(run, after, ids), _run(run, before, ids)) < 1e-5


def test_what_stock_operators_compute_is_left_to_them(quantized: Any) -> None:
    model = quantized(QuantSpec(4, PerBlock(32)), tied=False).model
    assert not LowerToLowBitLinearPass()(model).modified
    InsertTokenQuantizationPass({"c": ActivationQuantization(4)})(model)
    LowerToLowBitLinearPass()(model)
    LowerToMatMulNBitsPass()(model)
    LowerToGatherBlockQuantizedPass()(model)
    verify(model, Level.LOWERED)
    assert [node.op_type for node in note.with_role(model, note.LINEAR)] == [
        "MatMulNBits",
        "LowBitLinear",
        "MatMulNBits",
    ]


def test_nodes_keep_their_names_and_say_what_they_compute(quantized: Any) -> None:
    model = quantized(QuantSpec(3, PerChannel())).model
    _prepare(model, 4, online=False)
    LowerToLowBitLinearPass()(model)
    nodes = list(note.with_role(model, note.LINEAR))
    assert [node.name for node in nodes] == list(NAMES)
    assert {(note.executed(node), note.activation_bits(node)) for node in nodes} == {("int8", 4)}
    assert not [name for name in model.graph.initializers if name.endswith("_codes") and "embed" not in name]


def test_a_second_run_changes_nothing(quantized: Any) -> None:
    model = quantized(QuantSpec(3, PerChannel())).model
    LowerToLowBitLinearPass()(model)
    assert not LowerToLowBitLinearPass()(model).modified


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (QuantSpec(4, PerBlock(16)), "block size 16, but the bdq operators have"),
        (QuantSpec(4, PerChannel(), symmetric=False), "zero points, but the bdq operators have symmetric weights only"),
    ],
)
def test_weights_without_an_operator_are_an_error(quantized: Any, spec: QuantSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LowerToLowBitLinearPass(everything=True)(quantized(spec).model)


def test_scales_must_be_float16(quantized: Any) -> None:
    model = quantized(QuantSpec(4, PerChannel())).model
    scale = model.graph.initializers["c.weight_scale"]
    scale.const_value = ir.Tensor(scale.const_value.numpy() * np.float32(1.0001), name=scale.name)
    with pytest.raises(ValueError, match="node c: scales are not exact in float16"):
        LowerToLowBitLinearPass(everything=True)(model)
