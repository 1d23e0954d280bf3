"""Compute the logits of the last positions only, unless the caller asks for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import initializer, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level

INPUT = "logits_to_keep"
_DIMENSION = "logits_length"
_LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class KeepLastLogitsPass(GraphPass):
    """Give the graph the optional input `logits_to_keep` and slice the hidden states before lm_head.

        logits = MatMul(x, W)         x: [batch, sequence, hidden]
        ->
        last   = Slice(x, starts=-logits_to_keep, ends=∞, axes=1)
        logits = MatMul(last, W)      logits: [batch, min(logits_to_keep, sequence), vocabulary]

    `logits_to_keep` (int64 scalar) means what it means in transformers: 1 is the last position, 0 is all of them.
    It is a graph input *and* an initializer of value 1, which makes it optional: a session that never feeds it gets
    the last position. ONNX Runtime does not fold such an initializer, since it can be overridden.

    The graph output is declared `[batch, 1, vocabulary]`, its shape by default: onnxruntime-genai allocates it before
    the run and takes every other length to be that of the prompt. ONNX Runtime accepts another length with a warning.

    Requires FLOAT, ensures FLOAT (and so keeps ANNOTATED).

    Attributes:
        linear: logical path of the linear that makes the logits.
    """

    name: ClassVar[str] = "keep-last-logits"
    takes: ClassVar[Level] = Level.FLOAT
    gives: ClassVar[Level] = Level.FLOAT

    linear: str = "lm_head"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the input and the slice.

        Raises:
            ValueError: no linear of that path, or several.
        """
        if INPUT in (value.name for value in model.graph.inputs):
            return ir.passes.PassResult(model, modified=False)
        heads = [node for node in model.graph if note.parts(node) == (self.linear,)]
        if len(heads) != 1:
            raise ValueError(f"{len(heads)} linears are named {self.linear}, expected 1")
        head = heads[0]
        hidden = required_input(head, 0)
        keep = initializer(model, INPUT, np.array(1, np.int64))
        model.graph.inputs.append(keep)
        nodes = _slice(model, hidden, keep)
        model.graph.insert_before(head, nodes)
        head.replace_input_with(0, nodes[-1].outputs[0])
        _rename_dimension(nodes[-1].outputs[0], hidden.shape)
        _rename_downstream(head)
        return ir.passes.PassResult(model, modified=True)


def _slice(model: ir.Model, hidden: ir.Value, keep: ir.Value) -> list[ir.Node]:
    """Nodes that compute the last `keep` positions of `hidden`; the last node gives the result."""
    axis = initializer(model, f"{INPUT}/axis", np.array([1], np.int64))
    end = initializer(model, f"{INPUT}/end", np.array([_LAST], np.int64))
    shape = initializer(model, f"{INPUT}/shape", np.array([1], np.int64))
    negative = ir.node("Neg", [keep], name=f"{INPUT}/negative")
    start = ir.node("Reshape", [negative.outputs[0], shape], name=f"{INPUT}/start")
    last = ir.node("Slice", [hidden, start.outputs[0], end, axis], name=f"{INPUT}/last_positions")
    for node in (negative, start, last):
        node.outputs[0].name = f"{node.name}/output"
    last.outputs[0].type = hidden.type
    return [negative, start, last]


def _rename_downstream(head: ir.Node) -> None:
    """The sequence axis of everything after lm_head now has its own length; 1 where genai reads it."""
    waiting, seen = [head], set[ir.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for value in node.outputs:
            _rename_dimension(value, value.shape, 1 if value.is_graph_output() else _DIMENSION)
            waiting.extend(value.consumers())


def _rename_dimension(value: ir.Value, shape: ir.Shape | None, length: int | str = _DIMENSION) -> None:
    if shape is not None and len(shape) == 3:
        value.shape = ir.Shape([shape[0], length, shape[2]])
