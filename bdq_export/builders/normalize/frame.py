"""What all attention nodes share: sequence lengths from the mask, and the RoPE tables.

seqlens_k = Cast(ReduceSum(attention_mask, axis 1) - 1, int32)      [batch]
total     = Cast(Shape(attention_mask)[1], int32)                   scalar
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from bdq_export.builders.graph import constant, insert_first, set_name
from bdq_export.builders.rope import Rope, add_rope_tables

SEQUENCE_LENGTHS, TOTAL_LENGTH, COS_CACHE, SIN_CACHE = 5, 6, 7, 8
"""Inputs of GroupQueryAttention."""
_PAST_KEY = 3


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The GroupQueryAttention nodes, in layer order."""
    return [node for node in model.graph if node.op_type == "GroupQueryAttention"]


def layer_of(node: ir.Node) -> int:
    """The layer of an attention node, after its cache input `past_key_values.<layer>.key`."""
    past = node.inputs[_PAST_KEY]
    assert past is not None, "every attention node reads the cache"
    return int(str(past.name).split(".")[1])


def attach_frame(
    model: ir.Model, ropes: Mapping[str, Rope], layer_types: Sequence[str], context_length: int, layers: str
) -> None:
    """Compute lengths and RoPE tables once and let every attention node read them; what it read before goes dead.

    Args:
        model: has the graph input `attention_mask`.
        ropes: by layer type, or only "" where all layers share one.
        layer_types: type of each layer.
        context_length: rows of the RoPE tables.
        layers: path prefix of the decoder layers.
    """
    nodes = attention_nodes(model)
    lengths, total = _lengths(model)
    tables = {}
    for kind, rope in ropes.items():
        prefix = f"model.rotary_emb.{kind}" if kind else "model.rotary_emb"
        tables[kind] = add_rope_tables(model, rope, context_length, prefix)
    for node in nodes:
        layer = layer_of(node)
        set_name(node, f"{layers}.{layer}.self_attn")
        cos, sin = tables[""] if "" in tables else tables[layer_types[layer]]
        for index, value in ((SEQUENCE_LENGTHS, lengths), (TOTAL_LENGTH, total), (COS_CACHE, cos), (SIN_CACHE, sin)):
            node.replace_input_with(index, value)
        # No attribute of the operator, which takes the rotary part from the tables; mobius 0.1 writes it.
        node.attributes.pop("rotary_embedding_dim", None)


def _lengths(model: ir.Model) -> tuple[ir.Value, ir.Value]:
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    axis = constant(model, "sequence_lengths.axis", np.array([1], np.int64))
    one = constant(model, "sequence_lengths.one", np.array(1, np.int64))
    count = ir.node("ReduceSum", [mask, axis], {"keepdims": 0}, name="sequence_lengths.count")
    last = ir.node("Sub", [count.outputs[0], one], name="sequence_lengths.last")
    lengths = ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32.value}, name="sequence_lengths")
    shape = ir.node("Shape", [mask], name="total_length.shape")
    size = ir.node("Gather", [shape.outputs[0], one], {"axis": 0}, name="total_length.size")
    total = ir.node("Cast", [size.outputs[0]], {"to": ir.DataType.INT32.value}, name="total_length")
    insert_first(model, [count, last, lengths, shape, size, total])
    return lengths.outputs[0], total.outputs[0]
