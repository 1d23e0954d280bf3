"""Nothing of the machine or the code that made a graph stays in it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from bdq_passes import (
    AnnotateLinearsPass,
    InsertWeightQuantizationPass,
    Level,
    LowerToMatMulNBitsPass,
    StripMetadataPass,
)
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, QuantSpec

SECRET = "/home/somebody/model.py"


def _leaky(model: ir.Model) -> None:
    items = [model, model.graph, *model.graph, *model.graph.inputs, *model.graph.initializers.values()]
    items += [value for node in model.graph for value in node.outputs]
    for item in items:
        item.metadata_props["pkg.torch.onnx.stack_trace"] = SECRET
        item.doc_string = SECRET


def test_nothing_leaks(tiny: Any, run: Any, ids: Any) -> None:
    model = tiny().model
    expected = run(model, {"input_ids": ids})
    _leaky(model)
    assert SECRET.encode() in ir.to_proto(model).SerializeToString()
    assert StripMetadataPass({"version": "1"}, level=Level.FLOAT)(model).modified
    assert b"somebody" not in ir.to_proto(model).SerializeToString()
    assert dict(model.metadata_props) == {"version": "1"}
    assert (run(model, {"input_ids": ids}) == expected).all()


def test_functions_are_stripped_too(tiny: Any) -> None:
    model = tiny().model
    body = ir.node("Relu", [ir.Value(name="x")], metadata_props={"stack_trace": SECRET})
    graph = ir.Graph([body.inputs[0]], body.outputs, nodes=[body], opset_imports={"": 23})  # type: ignore[list-item]
    model.functions[("com.microsoft", "F", "")] = ir.Function("com.microsoft", "F", "", graph=graph, attributes=[])
    StripMetadataPass(level=Level.FLOAT)(model)
    assert not body.metadata_props


def test_annotations_stay(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    AnnotateLinearsPass(expected=3)(graph.model)
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)))
    weights.pop("model.embed_tokens.weight")
    InsertWeightQuantizationPass(weights, expected=2)(graph.model)
    LowerToMatMulNBitsPass()(graph.model)
    _leaky(graph.model)
    StripMetadataPass()(graph.model)
    node = next(node for node in graph.model.graph if node.name == "c")
    assert note.executed(node) == "int8"
    assert note.linear_count(graph.model) == 3


def test_second_run_changes_nothing(tiny: Any) -> None:
    model = tiny().model
    _leaky(model)
    item = StripMetadataPass({"version": "1"}, level=Level.FLOAT)
    item(model)
    assert not item(model).modified


def test_level_is_checked(tiny: Any) -> None:
    with pytest.raises(ir.passes.PreconditionError):
        StripMetadataPass()(tiny().model)
