"""Lower linears with static activations to the operator that multiplies integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import remove_unused, replace_node, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, dequantizer


@dataclass(frozen=True)
class LowerToQLinearMatMulPass(GraphPass):
    """Replace a MatMul between DequantizeLinears and a QuantizeLinear by QLinearMatMul.

        DQ(Q(MatMul(DQ(qx), DQ(W int8 [K, N], scales [N], 0))))  ->  DQ(QLinearMatMul(qx, ..., W, ..., y scale, y zero))

    Activations are uint8, weights int8 with one scale a column: ONNX Runtime's kernel then gives the rounded exact
    result, no code differs (measured). Only the other order, int8 x uint8, has no kernel.

    Requires QUANTIZED, ensures QUANTIZED, and LOWERED as far as these linears go. A second run changes nothing.
    """

    name: ClassVar[str] = "lower-to-qlinear-matmul"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every linear with static activations.

        Raises:
            ValueError: a linear that is annotated so but not surrounded by the pairs.
        """
        modified = False
        for node in note.with_role(model, note.LINEAR):
            if note.has_static_activations(node) and node.op_type == "MatMul":
                _lower(model, node)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _lower(model: ir.Model, node: ir.Node) -> None:
    weight = dequantizer(node)
    activation = required_input(node, 0).producer()
    readers = node.outputs[0].consumers()
    quantize = readers[0] if len(readers) == 1 else None
    if weight is None or activation is None or quantize is None:
        raise ValueError(f"node {node.name}: a linear with static activations, but not between quantizers")
    if (activation.op_type, quantize.op_type) != ("DequantizeLinear", "QuantizeLinear"):
        raise ValueError(
            f"node {node.name}: between {activation.op_type} and {quantize.op_type}, "
            "expected DequantizeLinear and QuantizeLinear"
        )
    inputs = [*activation.inputs[:3], *weight.inputs[:3], *quantize.inputs[1:3]]
    lowered = ir.node("QLinearMatMul", inputs, name=node.name)
    lowered.metadata_props.update(node.metadata_props)
    left_over = [activation.outputs[0], weight.outputs[0]]
    replace_node(quantize, lowered)
    model.graph.remove(node, safe=True)
    remove_unused(model, left_over)
    note.set_executed(lowered, "int8")
