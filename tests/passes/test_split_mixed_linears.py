"""A packed linear of mixed precision becomes one linear a part, and computes the same."""

from __future__ import annotations

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
    SplitMixedLinearsPass,
    verify,
)
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, QuantSpec

FOUR, EIGHT = QuantSpec(4, PerBlock(16)), QuantSpec(8, PerBlock(16))
COLUMNS = {"a.weight": 24, "b.weight": 16}


def _split(model: ir.Model, specs: dict[str, QuantSpec]) -> bool:
    AnnotateLinearsPass(expected=3)(model)
    return SplitMixedLinearsPass(specs, COLUMNS)(model).modified


@pytest.mark.parametrize("specs", [{"a.weight": FOUR}, {"a.weight": FOUR, "b.weight": EIGHT}])
def test_same_function_after_the_split(tiny: Any, run: Any, ids: Any, specs: dict[str, QuantSpec]) -> None:
    expected = run(tiny(bias=True).model, {"input_ids": ids})
    model = tiny(bias=True).model
    assert _split(model, specs)
    np.testing.assert_array_equal(run(model, {"input_ids": ids}), expected)
    assert [note.parts(node) for node in note.with_role(model, note.LINEAR)] == [("a",), ("b",), ("c",), ("lm_head",)]
    assert "ab.weight" not in model.graph.initializers


def test_mixed_precision_goes_through(tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any) -> None:
    graph = tiny(bias=True)
    weights = quantize_all(graph, FOUR, b=None)
    assert _split(graph.model, {name: weight.spec for name, weight in weights.items()})
    InsertWeightQuantizationPass(weights, expected=3)(graph.model)
    LowerToMatMulNBitsPass(accuracy_level=0)(graph.model)
    LowerToGatherBlockQuantizedPass()(graph.model)
    verify(graph.model, Level.LOWERED)
    expected = graph.reference(ids, {name: weight.dequantize() for name, weight in weights.items()})
    assert relative_error(run(graph.model, {"input_ids": ids}), expected) < 1e-5


def test_one_precision_is_left_alone(tiny: Any) -> None:
    assert not _split(tiny().model, {"a.weight": FOUR, "b.weight": FOUR})


def test_second_run_changes_nothing(tiny: Any) -> None:
    model = tiny().model
    _split(model, {"a.weight": FOUR})
    assert not SplitMixedLinearsPass({"a.weight": FOUR}, COLUMNS)(model).modified


def test_columns_of_one_group_may_be_left_out(tiny: Any, run: Any, ids: Any) -> None:
    expected = run(tiny().model, {"input_ids": ids})
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    SplitMixedLinearsPass({"b.weight": FOUR}, {"b.weight": 16})(model)
    np.testing.assert_array_equal(run(model, {"input_ids": ids}), expected)


def test_neighbours_of_one_spec_stay_together(tiny: Any, run: Any, ids: Any) -> None:
    expected = run(tiny().model, {"input_ids": ids})
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    packed = next(node for node in model.graph if node.name == "ab")
    note.set_parts(packed, ("x.a", "x.b", "x.c"))
    SplitMixedLinearsPass({"x.a.weight": FOUR}, {"x.a.weight": 24})(model)
    assert [node.name for node in note.with_role(model, note.LINEAR)] == ["x.a", "x.b+c", "c", "lm_head"]
    np.testing.assert_array_equal(run(model, {"input_ids": ids}), expected)


@pytest.mark.parametrize("columns", [{"a.weight": 24, "b.weight": 8}, {"a.weight": 40}, {}])
def test_columns_that_do_not_add_up_are_an_error(tiny: Any, columns: dict[str, int]) -> None:
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    with pytest.raises(ValueError, match=r"node ab: parts .* columns, expected 40 in all"):
        SplitMixedLinearsPass({"a.weight": FOUR}, columns)(model)
