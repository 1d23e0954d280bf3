"""Attention over a quantized cache: the graph is that of the reference, whatever form attention had."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import LowerToKVAttentionPass
from bdq_passes import annotations as note
from bdq_passes.functions import attach_functions
from bdq_runtime.reference import kv_attention
from bdq_runtime.specs import KVQuantization

HEADS, KV_HEADS, SIZE = 4, 2, 16
CACHE = KVQuantization(4, 3, 0.95, 0.9, hadamard=True)
NAME, TOKENS = "layers.3.attention", 5


def _value(name: str, data_type: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(data_type), shape=ir.Shape(shape))


def _model(packed: bool, rotary: bool, **attributes: Any) -> ir.Model:
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
    node = ir.node(
        "GroupQueryAttention", inputs, given, domain="com.microsoft", num_outputs=3, name="layers.3.attention"
    )
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


def _feeds(packed: bool, rotary: bool) -> dict[str, Any]:
    random = np.random.default_rng(0)
    q, k, v = (
        random.standard_normal((1, TOKENS, SIZE * heads)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    angles = np.arange(8)[:, None] * 0.5 ** np.arange(SIZE // 2)
    hidden = {"qkv": np.concatenate([q, k, v], axis=-1)} if packed else {"q": q, "k": k, "v": v}
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)} if rotary else {}
    return {
        **hidden,
        "past_key_values.3.key": np.zeros((1, KV_HEADS, 0, SIZE * 4 // 8 + 4), np.uint8),
        "past_key_values.3.value": np.zeros((1, KV_HEADS, 0, SIZE * 3 // 8 + 4), np.uint8),
        "lengths": np.array([TOKENS - 1], np.int32),
        "total": np.array(TOKENS, np.int32),
        **tables,
    }


def _reference(feeds: dict[str, Any], **attributes: Any) -> Any:
    if "qkv" in feeds:
        q, k, v = np.split(feeds["qkv"], [SIZE * HEADS, SIZE * (HEADS + KV_HEADS)], axis=-1)
    else:
        q, k, v = feeds["q"], feeds["k"], feeds["v"]
    pasts = (feeds["past_key_values.3.key"], feeds["past_key_values.3.value"])
    return kv_attention(
        q, k, v, *pasts, feeds["lengths"], TOKENS, feeds.get("cos"), feeds.get("sin"),
        num_heads=HEADS, kv_num_heads=KV_HEADS, head_size=SIZE, key_bits=4, value_bits=3, key_clip=0.95,
        value_clip=0.9, hadamard=1, scale=0.3, **attributes,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("extra", [{}, {"local_window_size": 2, "softcap": 4.0}])
def test_the_reference_over_the_same_cache(packed: bool, rotary: bool, extra: dict[str, Any], run: Any) -> None:
    model = _model(packed, rotary, **extra)
    LowerToKVAttentionPass({3: CACHE})(model)
    (node,) = model.graph
    assert node.op_type == f"{'Packed' if packed else ''}{'Rotary' if rotary else ''}KVAttention"
    assert node.name == NAME
    attach_functions(model)
    feeds = _feeds(packed, rotary)
    found = run(model, feeds)
    expected = _reference(feeds, **extra)
    for value, wanted in zip(found[1:], (expected.present_key, expected.present_value), strict=True):
        np.testing.assert_array_equal(value, wanted)
    np.testing.assert_allclose(found[0], expected.output, rtol=1e-5, atol=1e-5)


def test_inputs_and_outputs_get_the_shape_of_the_cache() -> None:
    model = _model(True, True)
    LowerToKVAttentionPass({3: CACHE})(model)
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    for kind, row in (("key", SIZE * 4 // 8 + 4), ("value", SIZE * 3 // 8 + 4)):
        for name, length in ((f"past_key_values.3.{kind}", "past"), (f"present.3.{kind}", "total")):
            assert values[name].dtype == ir.DataType.UINT8
            assert values[name].shape == ir.Shape(["b", KV_HEADS, length, row])


@pytest.mark.parametrize(
    ("attributes", "caches", "message"),
    [
        ({}, {4: CACHE}, "1 layers to get a quantized cache have no GroupQueryAttention, the first is 4"),
        ({}, {3: KVQuantization(4, 5)}, "a cache of 4 and 5 bits"),
        ({}, {3: KVQuantization(4, 4, 0.0)}, "cache clip 0.0"),
        ({"smooth_softmax": 1}, {3: CACHE}, "smooth_softmax"),
        ({"rotary_interleaved": 1}, {3: CACHE}, "interleaved RoPE"),
    ],
)
def test_what_the_operators_do_not_have_is_an_error(
    attributes: dict[str, Any], caches: dict[int, KVQuantization], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LowerToKVAttentionPass(caches)(_model(True, True, **attributes))
