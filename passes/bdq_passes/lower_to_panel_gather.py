"""Look embeddings up in the panels that a tied lm_head of a `bdq` operator reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import LINEAR_OPS
from bdq_passes.graph_edit import initializer, remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, dequantizer, weight_value
from bdq_runtime.panels import CHUNK, LANES

_ONE_PLANE = (2, 4, 8)
_LANE_BYTES = 4


@dataclass(frozen=True)
class LowerToPanelGatherPass(GraphPass):
    """Replace Gather on a dequantized table by a lookup in the initializers of a LowBitLinear that is tied to it.

        Gather(DequantizeLinear(codes [V, K], scales), ids);  LowBitLinear(x, panels, scales)  {bdq.tied: table}
        ->
        panel, lane = ids / 16, ids mod 16
        row         = the bytes of `lane` in Gather(panels, panel)           [batch, sequence, K * bits / 8]
        embeddings  = (unpacked row - 2^(bits-1)) * Gather(scales, ids)

    so that the file holds one table, and memory too. Tables of one scale a row and 2, 4 or 8 bits; others are left to
    `lower-to-gather-block-quantized`, which stores a second one. 16 rows are read for one, which a lookup of some
    thousand bytes a token hardly notices.

    Requires QUANTIZED, ensures QUANTIZED. A second run changes nothing.
    """

    name: ClassVar[str] = "lower-to-panel-gather"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the embeddings whose table such an operator reads."""
        heads = {
            note.tied(node): node
            for node in note.with_role(model, note.LINEAR)
            if node.op_type in LINEAR_OPS and node.attributes["block_size"].as_int() == 0
        }
        modified = False
        for node in note.with_role(model, note.EMBEDDING):
            dequantize = dequantizer(node)
            if dequantize is None:
                continue
            head = heads.get(str(required_input(dequantize, 0).name).removesuffix("_codes"))
            if head is not None and head.attributes["weight_bits"].as_int() in _ONE_PLANE:
                _lower(model, node, head)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _lower(model: ir.Model, node: ir.Node, head: ir.Node) -> None:
    front = 2 if "hadamard_size" in head.attributes else 1
    weight, scales = required_input(head, front), required_input(head, front + 1)
    bits, columns = head.attributes["weight_bits"].as_int(), head.attributes["K"].as_int()
    table, name = weight_value(node), str(node.name)
    graph = _Nodes(model, name)
    ids = required_input(node, 1)
    panel = graph.add("Div", "panel", [ids, graph.constant("lanes", np.array(LANES, np.int64))])
    lane = graph.add("Mod", "lane", [ids, graph.constant("lanes", np.array(LANES, np.int64))])
    lane = graph.add("Unsqueeze", "lane_index", [lane, graph.constant("last", np.array([-1], np.int64))])
    gather = ir.node("Gather", [weight, panel], {"axis": 0}, name=name)
    gather.metadata_props.update(node.metadata_props)
    found = graph.put(gather, f"{name}/panels")
    by_lane = graph.constant("by_lane", np.array([0, 0, -1, LANES, _LANE_BYTES], np.int64))
    found = graph.add("Reshape", "by_vector", [found, by_lane])
    found = graph.add("Transpose", "by_lane", [found], perm=[0, 1, 3, 2, 4])
    found = graph.add("GatherND", "row", [found, lane], batch_dims=2)
    values = graph.add("Cast", "values", [_columns(graph, found, bits, columns)], to=ir.DataType.FLOAT)
    odd = head.attributes["weight_grid"].as_int() == 1
    if odd:
        values = graph.add("Add", "doubled", [values, values])
    zero = (1 << bits) - 1 if odd else 1 << (bits - 1)
    values = graph.add("Sub", "centred", [values, graph.constant("zero", np.array(zero, np.float32))])
    flat = graph.add("Reshape", "scales", [scales, graph.constant("flat", np.array([-1], np.int64))])
    scale = graph.add("Gather", "scale", [flat, ids], axis=0)
    scale = graph.add("Cast", "scale_float", [scale], to=ir.DataType.FLOAT)
    scale = graph.add("Unsqueeze", "scale_column", [scale, graph.constant("last", np.array([-1], np.int64))])
    result = graph.add("Mul", "scaled", [values, scale])
    source = node.outputs[0]
    output, result.type, result.shape = str(source.name), source.type, source.shape
    model.graph.insert_before(node, graph.nodes)
    source.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    result.name = output
    remove_unused(model, [table])


def _columns(graph: _Nodes, row: ir.Value, bits: int, columns: int) -> ir.Value:
    """Codes `[batch, sequence, columns]` uint8 of the bytes `[batch, sequence, vectors, 4]` of a lane."""
    if bits < 8:
        mask = graph.constant("mask", np.array((1 << bits) - 1, np.uint8))
        axis = graph.constant("field_axis", np.array([3], np.int64))
        fields = []
        for field in range(8 // bits):
            shift = graph.constant(f"shift_{field}", np.array(field * bits, np.uint8))
            code = graph.add("BitShift", f"shifted_{field}", [row, shift], direction="RIGHT")
            code = graph.add("BitwiseAnd", f"field_{field}", [code, mask])
            fields.append(graph.add("Unsqueeze", f"field_{field}_axis", [code, axis]))
        row = graph.add("Concat", "fields", fields, axis=3)
    flat = graph.add("Reshape", "codes", [row, graph.constant("row_shape", np.array([0, 0, -1], np.int64))])
    if columns % CHUNK == 0:
        return flat
    bounds = [graph.constant(key, np.array([value], np.int64)) for key, value in
              (("start", 0), ("end", columns), ("column_axis", 2))]  # fmt: skip
    return graph.add("Slice", "columns", [flat, *bounds])


class _Nodes:
    """Nodes to be inserted, called `<prefix>/<name>`."""

    def __init__(self, model: ir.Model, prefix: str) -> None:
        self.model, self.prefix = model, prefix
        self.nodes: list[ir.Node] = []

    def add(self, op_type: str, name: str, inputs: list[ir.Value], **attributes: Any) -> ir.Value:
        """The output of a new node."""
        path = f"{self.prefix}/{name}"
        return self.put(ir.node(op_type, inputs, attributes, name=path), f"{path}/output")

    def put(self, node: ir.Node, output: str) -> ir.Value:
        """The output of `node`, which is the next one."""
        self.nodes.append(node)
        node.outputs[0].name = output
        return node.outputs[0]

    def constant(self, name: str, array: Any) -> ir.Value:
        """A small initializer."""
        return initializer(self.model, f"{self.prefix}/{name}", array)
