"""Scales in float16 change the file, not the function, whatever the optimiser does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import (
    AnnotateLinearsPass,
    InsertWeightQuantizationPass,
    Level,
    LowerToGatherBlockQuantizedPass,
    LowerToMatMulNBitsPass,
    StoreScalesAsFp16Pass,
    verify,
)
from bdq_runtime.packing import PerBlock, QuantSpec


def _lowered(graph: Any, weights: Any, level: int) -> ir.Model:
    AnnotateLinearsPass(expected=3)(graph.model)
    InsertWeightQuantizationPass(weights, expected=3)(graph.model)
    LowerToMatMulNBitsPass(accuracy_level=level)(graph.model)
    LowerToGatherBlockQuantizedPass()(graph.model)
    return graph.model


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_function_is_unchanged(
    tiny: Any,
    quantize_all: Any,
    run: Any,
    ids: Any,
    relative_error: Any,
    level: int,
    bits: int,
    symmetric: bool,
    tied: bool,
) -> None:
    graph = tiny(tied=tied)
    model = _lowered(graph, quantize_all(graph, QuantSpec(bits, PerBlock(32), symmetric)), level)
    expected = run(model, {"input_ids": ids})
    assert StoreScalesAsFp16Pass()(model).modified
    verify(model, Level.LOWERED)
    np.testing.assert_array_equal(run(model, {"input_ids": ids}, optimize=True), expected)
    # Unoptimised, the kernel gets scales that are no constants and computes in another way: right all the same.
    assert relative_error(run(model, {"input_ids": ids}), expected) < (1e-5 if level == 0 and bits < 8 else 5e-2)


def test_without_the_identity_the_unoptimised_product_is_wrong(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any
) -> None:
    # The reason for the Identity: drop both when ONNX Runtime packs codes only together with their scales.
    graph = tiny()
    model = _lowered(graph, quantize_all(graph, QuantSpec(4, PerBlock(32))), level=4)
    expected = run(model, {"input_ids": ids})
    StoreScalesAsFp16Pass()(model)
    for node in list(model.graph):
        if node.op_type == "Identity":
            assert node.inputs[0] is not None
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
    assert relative_error(run(model, {"input_ids": ids}), expected) > 0.5


def test_no_float32_scale_is_left(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _lowered(graph, quantize_all(graph, QuantSpec(4, PerBlock(32))), level=4)
    StoreScalesAsFp16Pass()(model)
    scales = {name: value.dtype for name, value in model.graph.initializers.items() if "scale" in name}
    # The tied lm_head shares the embedding's.
    assert len(scales) == 3
    assert set(scales.values()) == {ir.DataType.FLOAT16}


def test_inexact_scales_are_an_error(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(32)))
    for factor in (np.float32(1.0001), np.float32(1e6)):
        other = tiny()
        wrong = replace(weights["c.weight"], scales=weights["c.weight"].scales * factor)
        model = _lowered(other, {**weights, "c.weight": wrong}, level=4)
        with pytest.raises(ValueError, match=r"scales c\.weight_packed_scale are not exact in float16"):
            StoreScalesAsFp16Pass()(model)


def test_second_run_changes_nothing(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _lowered(graph, quantize_all(graph, QuantSpec(4, PerBlock(32))), level=4)
    StoreScalesAsFp16Pass()(model)
    assert not StoreScalesAsFp16Pass()(model).modified
