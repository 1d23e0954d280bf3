"""Each level refuses a graph that is not there yet, and names the node."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from bdq_passes import (
    AnnotateLinearsPass,
    InsertWeightQuantizationPass,
    Level,
    LevelError,
    LowerToMatMulNBitsPass,
    verify,
)
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, QuantSpec


def test_float_graph_is_not_yet_annotated(tiny: Any) -> None:
    model = tiny().model
    verify(model, Level.FLOAT)
    with pytest.raises(LevelError, match="run annotate-linears"):
        verify(model, Level.ANNOTATED)


def test_unknown_domain_is_refused(tiny: Any) -> None:
    model = tiny().model
    model.graph[0].domain = "other"
    with pytest.raises(LevelError, match="embed_tokens: domain 'other'"):
        verify(model, Level.FLOAT)


def test_lost_linear_is_noticed(tiny: Any) -> None:
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    next(node for node in model.graph if node.name == "c").metadata_props.pop("bdq.role")
    with pytest.raises(LevelError, match="2 linears are annotated, expected 3"):
        verify(model, Level.ANNOTATED)


def test_undecided_weight_is_not_quantized(tiny: Any) -> None:
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    with pytest.raises(LevelError, match="embed_tokens: neither quantized nor kept"):
        verify(model, Level.QUANTIZED)


def test_annotation_without_dequantizer_is_refused(tiny: Any) -> None:
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    for node in model.graph:
        if note.role(node):
            note.set_spec(node, QuantSpec(4, PerBlock(16)))
    with pytest.raises(LevelError, match="is no dequantized initializer"):
        verify(model, Level.QUANTIZED)


def test_lowered_means_every_weight(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    AnnotateLinearsPass(expected=3)(graph.model)
    InsertWeightQuantizationPass(quantize_all(graph, QuantSpec(4, PerBlock(16))), expected=3)(graph.model)
    verify(graph.model, Level.QUANTIZED)
    with pytest.raises(LevelError, match="expected a lowered operator"):
        verify(graph.model, Level.LOWERED)
    LowerToMatMulNBitsPass()(graph.model)
    with pytest.raises(LevelError, match="embed_tokens: Gather on a dequantized weight"):
        verify(graph.model, Level.LOWERED)


def test_pass_refuses_the_wrong_level(tiny: Any) -> None:
    with pytest.raises(ir.passes.PreconditionError):
        InsertWeightQuantizationPass({}, expected=0)(tiny().model)
