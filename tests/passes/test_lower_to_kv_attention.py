"""Attention over a quantized cache: the graph is that of the reference, whatever form attention had."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from attention_model import HEADS, KV_HEADS, NAME, SIZE, attention_model

from bdq_passes import LowerToKVAttentionPass
from bdq_passes.functions import attach_functions
from bdq_runtime.reference import kv_attention
from bdq_runtime.specs import KVQuantization

CACHE = KVQuantization(4, 3, 0.95, 0.9, hadamard=True)
TOKENS = 5


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
    model = attention_model(packed, rotary, **extra)
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
    model = attention_model(True, True)
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
        LowerToKVAttentionPass(caches)(attention_model(True, True, **attributes))
