"""A graph of one GroupQueryAttention, as builders write it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from bdq_passes import annotations as note

HEADS, KV_HEADS, SIZE = 4, 2, 16
NAME = "layers.3.attention"


def _value(name: str, data_type: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(data_type), shape=ir.Shape(shape))


def attention_model(packed: bool = True, rotary: bool = True, **attributes: Any) -> ir.Model:
    """One GroupQueryAttention, all of whose inputs are graph inputs."""
    widths = {"qkv": HEADS + 2 * KV_HEADS} if packed else {"q": HEADS, "k": KV_HEADS, "v": KV_HEADS}
    hidden = [_value(name, ir.DataType.FLOAT, ["b", "s", SIZE * width]) for name, width in widths.items()]
    pasts = [
        _value(f"past_key_values.3.{kind}", ir.DataType.FLOAT, ["b", KV_HEADS, "past", SIZE])
        for kind in ("key", "value")
    ]
    lengths, total = _value("lengths", ir.DataType.INT32, ["b"]), _value("total", ir.DataType.INT32, [])
    tables = [_value(name, ir.DataType.FLOAT, ["positions", SIZE // 2]) for name in ("cos", "sin")] if rotary else []
    given = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": 0.3, "do_rotary": int(rotary), **attributes}
    inputs = [*hidden, *([None, None] if packed else []), *pasts, lengths, total, *tables]
    node = ir.node("GroupQueryAttention", inputs, given, domain="com.microsoft", num_outputs=3, name=NAME)
    for output, name in zip(node.outputs, ("y", "present.3.key", "present.3.value"), strict=True):
        output.name, output.type = name, ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(["b", "s", HEADS * SIZE])
    for output in node.outputs[1:]:
        output.shape = ir.Shape(["b", KV_HEADS, "total", SIZE])
    opsets = {"": 23, "com.microsoft": 1}
    graph_inputs = [*hidden, *pasts, lengths, total, *tables]
    graph = ir.Graph(graph_inputs, node.outputs, nodes=[node], opset_imports=opsets, name="attention")
    model = ir.Model(graph, ir_version=10)
    note.set_linear_count(model, 0)
    return model
