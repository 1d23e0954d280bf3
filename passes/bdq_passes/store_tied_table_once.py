"""Write a float table that embedding and lm_head share once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level


@dataclass(frozen=True)
class StoreTiedTableOncePass(GraphPass):
    """Let a tied lm_head that stayed float read the embedding's table.

        MatMul(x, W: initializer [K, N])      {bdq.tied: E, bdq.kept}
        ->
        MatMul(x, Transpose(E))               E: initializer [N, K], read by the embedding too

    The weight of lm_head is a transposed view of the table while the graph is made, but a file has no views. ONNX
    Runtime transposes when it opens the model.

    Requires QUANTIZED, ensures QUANTIZED (and so keeps LOWERED).
    """

    name: ClassVar[str] = "store-tied-table-once"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the weight of each such MatMul."""
        modified = False
        for node in note.with_role(model, note.LINEAR):
            table = model.graph.initializers.get(note.tied(node) or "")
            weight = required_input(node, 1)
            if not note.is_kept(node) or table is None or not weight.is_initializer():
                continue
            if weight.shape is None or table.shape is None or tuple(weight.shape) != tuple(table.shape)[::-1]:
                raise ValueError(
                    f"node {node.name}: weight {weight.shape} is no transpose of {table.name} {table.shape}"
                )
            transpose = ir.node("Transpose", [table], {"perm": [1, 0]}, name=f"{node.name}/transposed_table")
            value = transpose.outputs[0]
            value.name, value.type, value.shape = f"{transpose.name}/output", weight.type, weight.shape
            model.graph.insert_before(node, transpose)
            node.replace_input_with(1, value)
            remove_unused(model, [weight])
            modified = True
        return ir.passes.PassResult(model, modified=modified)
