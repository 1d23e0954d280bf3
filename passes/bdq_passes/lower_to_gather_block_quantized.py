"""Lower embeddings with quantized tables to the operator that dequantizes only the rows asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import initializer, remove_unused, replace_node, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import CONTRIB, Level, dequantizer, weight_value
from bdq_passes.packed_weights import PackedWeight, add_packed, check_bits, read_weight


@dataclass(frozen=True)
class LowerToGatherBlockQuantizedPass(GraphPass):
    """Replace Gather on a dequantized table by `com.microsoft::GatherBlockQuantized`.

        Gather(DequantizeLinear(codes [V, K], scales, zero points), ids)
        ->
        rows = GatherBlockQuantized(B [V, blocks, block_size*bits/8], ids, Reshape(scales, [V, blocks, 1]))
        Reshape(rows [batch, sequence, blocks, block_size], [0, 0, -1])

    The table is gathered in MatMulNBits' own three-dimensional layout, so a tied lm_head reads the *same* initializer:
    one copy in the file, one in memory beside the kernel's prepacked one. (Reshaping B to the usual two dimensions
    makes ONNX Runtime fold a second copy at load: 89 MB of private memory against 45 for a 49152 x 576 table of
    8 bits.) Rows that are no multiple of the block are cut to K.

    Requires QUANTIZED, ensures QUANTIZED, and LOWERED as far as embeddings go. A second run changes nothing.
    """

    name: ClassVar[str] = "lower-to-gather-block-quantized"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every embedding.

        Raises:
            ValueError: bits without a kernel.
        """
        modified = False
        for node in note.with_role(model, note.EMBEDDING):
            dequantize = dequantizer(node)
            if dequantize is None:
                continue
            weight = read_weight(node, dequantize)
            check_bits(node, weight.spec, "GatherBlockQuantized")
            base = str(required_input(dequantize, 0).name).removesuffix("_codes")
            _lower(model, node, base, add_packed(model, base, weight))
            modified = True
        model.opset_imports.setdefault(CONTRIB, 1)
        return ir.passes.PassResult(model, modified=modified)


def _lower(model: ir.Model, node: ir.Node, base: str, packed: PackedWeight) -> None:
    rows, columns = packed.weight.codes.shape
    blocks = packed.weight.scales.shape[1]
    by_row = initializer(model, f"{base}/by_row", np.array([rows, blocks, 1], np.int64))
    scales = _named("Reshape", [packed.scales, by_row], f"{base}/scale_by_row")
    before = [scales]
    inputs = [packed.codes, node.inputs[1], scales.outputs[0]]
    if packed.weight.zero_points is not None:
        # One byte a block, not the packed nibbles of MatMulNBits: the last axis of these is a single element.
        array = packed.weight.zero_points[:, :, None]
        inputs.append(initializer(model, f"{base}_packed_zero_point_by_row", array))
    attributes = {"bits": packed.bits, "block_size": packed.block_size, "gather_axis": 0, "quantize_axis": 2}
    gather = ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB, name=node.name)
    flat = initializer(model, f"{base}/flat", np.array([0, 0, -1], np.int64))
    weight = weight_value(node)
    replace_node(node, gather)
    remove_unused(model, [weight, *([] if packed.zero_points is None else [packed.zero_points])])
    after = [_named("Reshape", [gather.outputs[0], flat], f"{base}/join_blocks")]
    if blocks * packed.block_size != columns:
        bounds = [initializer(model, f"{base}/{key}", np.array([value], np.int64)) for key, value in
                  (("start", 0), ("end", columns), ("axis", 2))]  # fmt: skip
        after.append(_named("Slice", [after[-1].outputs[0], *bounds], f"{base}/cut_padding"))
    model.graph.insert_before(gather, before)
    model.graph.insert_after(gather, after)
    _hand_over(gather, after)


def _hand_over(gather: ir.Node, after: list[ir.Node]) -> None:
    """Give the last of `after` the name, type and readers that the output of `gather` has."""
    source, target = gather.outputs[0], after[-1].outputs[0]
    name, target.type, target.shape = source.name, source.type, source.shape
    for reader, index in source.uses():
        if reader is not after[0]:
            reader.replace_input_with(index, target)
    source.name, source.shape = f"{gather.name}/blocks", None
    target.name = name


def _named(op_type: str, inputs: list[ir.Value], name: str) -> ir.Node:
    node = ir.node(op_type, inputs, name=name)
    node.outputs[0].name = f"{name}/output"
    return node
