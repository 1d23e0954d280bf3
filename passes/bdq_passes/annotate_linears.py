"""Mark every linear and every embedding of a float graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level


@dataclass(frozen=True)
class AnnotateLinearsPass(GraphPass):
    """Give each MatMul that names its parts the role `linear`, each Gather of a float table `embedding`.

        MatMul(x, W: initializer [K, N])  {bdq.parts}   ->  the same, {bdq.role: linear}
        Gather(E: initializer [V, K], ids)              ->  the same, {bdq.role: embedding}

    Requires FLOAT, ensures ANNOTATED.

    Attributes:
        expected: linears the model has. A builder that lost some, or that did not name the parts of a weight,
            would give a graph that stays partly float without a word, so another count is an error.
    """

    name: ClassVar[str] = "annotate-linears"
    takes: ClassVar[Level] = Level.FLOAT
    gives: ClassVar[Level] = Level.ANNOTATED

    expected: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Mark the nodes.

        Raises:
            ValueError: a count other than `expected`, or a MatMul with a weight that names no parts.
        """
        if note.linear_count(model) is not None:
            return ir.passes.PassResult(model, modified=False)
        found = 0
        for node in model.graph:
            if node.op_type == "MatMul" and _is_weight(node.inputs[1]):
                if not note.parts(node):
                    raise ValueError(f"node {node.name}: a MatMul with a weight but without {note.PARTS}")
                note.set_role(node, note.LINEAR)
                found += 1
            elif node.op_type == "Gather" and _is_table(node.inputs[0]):
                note.set_role(node, note.EMBEDDING)
        if found != self.expected:
            raise ValueError(f"{found} linears found in the graph, expected {self.expected}")
        note.set_linear_count(model, found)
        return ir.passes.PassResult(model, modified=True)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 2


def _is_table(value: ir.Value | None) -> bool:
    if not _is_weight(value) or value is None or value.const_value is None:
        return False
    return value.is_initializer() and value.const_value.dtype.is_floating_point()
