"""Attention over a quantized KV cache (docs/ops.md, "Quantized-KV attention")."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body
from bdq_passes.functions.cache_rows import dequantize_rows, quantize_rows
from bdq_passes.functions.hadamard import hadamard

_END = np.iinfo(np.int64).max


def attention(body: Body, inputs: dict[str, ir.Value]) -> Sequence[ir.Value]:
    """`output`, `present_key`, `present_value` of any of the four attention operators, told apart by their inputs."""
    query_key, value, tokens = _heads(body, inputs)
    total = body.op("Cast", body.reshape(inputs["total_sequence_length"]), to=ir.DataType.INT64)
    positions = _positions(body, inputs["seqlens_k"], tokens, total)
    if "cos_cache" in inputs:
        query_key = _rotate(body, query_key, positions, inputs["cos_cache"], inputs["sin_cache"])

    def transformed(inner: Body, wanted: int) -> ir.Value:
        return hadamard(inner, query_key, "head_size") if wanted else inner.op("Identity", query_key)

    query_key = body.choose("hadamard", int, transformed)
    query = body.cut(query_key, 2, 0, body.attribute("num_heads"))
    key = body.cut(query_key, 2, body.attribute("num_heads"), _END)
    places = _places(body, inputs["past_key"], positions)
    present_key = _append(body, inputs["past_key"], quantize_rows(body, key, "key_bits", "key_clip"), places, total)
    present_value = _append(
        body, inputs["past_value"], quantize_rows(body, value, "value_bits", "value_clip"), places, total
    )
    keys = dequantize_rows(body, body.cut(present_key, 2, 0, total), "key_bits")
    values = dequantize_rows(body, body.cut(present_value, 2, 0, total), "value_bits")
    output = _attend(body, query, keys, values, _mask(body, positions, total), tokens, total)
    return output, present_key, present_value


def _heads(body: Body, inputs: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Query and key heads `[B, S, num_heads + kv_num_heads, D]`, value heads `[B, S, kv_num_heads, D]`, and S."""
    size, first = body.attribute("head_size"), inputs["qkv" if "qkv" in inputs else "query"]
    tokens = body.reshape(body.op("Shape", first, start=1, end=2))
    if "qkv" in inputs:
        heads = body.reshape(inputs["qkv"], 0, 0, -1, size)
        border = body.op("Add", body.attribute("num_heads"), body.attribute("kv_num_heads"))
        return body.cut(heads, 2, 0, border), body.cut(heads, 2, border, _END), tokens
    query_key = body.op("Concat", inputs["query"], inputs["key"], axis=-1)
    return body.reshape(query_key, 0, 0, -1, size), body.reshape(inputs["value"], 0, 0, -1, size), tokens


def _positions(body: Body, seqlens: ir.Value, tokens: ir.Value, total: ir.Value) -> ir.Value:
    """Where the tokens of each row are: int64 `[B, S]`."""
    last = body.op("Cast", body.reshape(seqlens, -1, 1), to=ir.DataType.INT64)
    past = body.op("Sub", body.op("Add", last, np.int64(1)), tokens)
    past = body.op("Where", body.op("Equal", tokens, total), np.int64(0), past)
    return body.op("Add", past, body.op("Range", np.int64(0), tokens, np.int64(1)))


def _rotate(body: Body, x: ir.Value, positions: ir.Value, cos_cache: ir.Value, sin_cache: ir.Value) -> ir.Value:
    """RoPE of heads `[B, S, heads, D]`: the halves of the first rotary_dim channels turn."""
    cos, sin = (
        body.op("Unsqueeze", body.op("Gather", cache, positions, axis=0), body.ints(2))
        for cache in (cos_cache, sin_cache)
    )
    half = body.op("Shape", cos_cache, start=1, end=2)
    both = body.op("Add", half, half)
    first, second = body.cut(x, 3, 0, half), body.cut(x, 3, half, both)
    turned = [
        body.op("Sub", body.op("Mul", first, cos), body.op("Mul", second, sin)),
        body.op("Add", body.op("Mul", second, cos), body.op("Mul", first, sin)),
    ]
    return body.op("Concat", *turned, body.cut(x, 3, both, _END), axis=3)


def _places(body: Body, past: ir.Value, positions: ir.Value) -> ir.Value:
    """Indices `[B, kv_num_heads, S, 3]` of batch row, head and position in the cache."""
    one = np.int64(1)
    batch, heads = (body.reshape(body.op("Shape", past, start=axis, end=axis + 1)) for axis in (0, 1))
    parts = [
        body.reshape(body.op("Range", np.int64(0), batch, one), -1, 1, 1, 1),
        body.reshape(body.op("Range", np.int64(0), heads, one), 1, -1, 1, 1),
        body.op("Unsqueeze", positions, body.ints(1, 3)),
    ]
    size = body.op(
        "Concat", body.op("Shape", past, start=0, end=2), body.op("Shape", positions, start=1), body.ints(1), axis=0
    )
    return body.op("Concat", *(body.op("Expand", part, size) for part in parts), axis=-1)


def _append(body: Body, past: ir.Value, rows: ir.Value, places: ir.Value, total: ir.Value) -> ir.Value:
    """`past [B, heads, positions, row]` with `rows [B, S, heads, row]` at their places, longer if the text is."""
    missing = body.op("Sub", body.shape(total), body.op("Shape", past, start=2, end=3))
    size = body.op(
        "Concat",
        body.op("Shape", past, start=0, end=2),
        body.op("Max", missing, body.ints(0)),
        body.op("Shape", past, start=3),
        axis=0,
    )
    room = body.op("ConstantOfShape", size, value=ir.tensor(np.zeros(1, np.uint8)))
    moved = body.op("Transpose", rows, perm=[0, 2, 1, 3])
    return body.op("ScatterND", body.op("Concat", past, room, axis=2), places, moved)


def _mask(body: Body, positions: ir.Value, total: ir.Value) -> ir.Value:
    """What is added to scores `[B, kv_num_heads, G, S, keys]`: 0, or -inf where a token does not see a key."""
    keys = body.op("Range", np.int64(0), total, np.int64(1))
    at = body.op("Unsqueeze", positions, body.ints(2))
    seen = body.op("LessOrEqual", keys, at)

    def near(inner: Body, windowed: bool) -> ir.Value:
        if not windowed:
            return inner.op("Identity", seen)
        first = inner.op("Sub", at, inner.attribute("local_window_size"))
        return inner.op("And", seen, inner.op("Greater", keys, first))

    seen = body.choose("local_window_size", lambda size: size > 0, near)
    return body.op("Unsqueeze", body.op("Where", seen, np.float32(0), np.float32(-np.inf)), body.ints(1, 2))


def _attend(
    body: Body, query: ir.Value, keys: ir.Value, values: ir.Value, mask: ir.Value, tokens: ir.Value, total: ir.Value
) -> ir.Value:
    """`[B, S, num_heads * D]` of query heads `[B, S, num_heads, D]`, keys and values `[B, kv_num_heads, keys, D]`."""
    size = body.attribute("head_size")
    grouped = body.reshape(query, 0, 0, body.attribute("kv_num_heads"), -1, size)
    grouped = body.op("Mul", body.op("Transpose", grouped, perm=[0, 2, 3, 1, 4]), body.attribute("scale"))
    scores = body.op("MatMul", body.reshape(grouped, 0, 0, -1, size), body.op("Transpose", keys, perm=[0, 1, 3, 2]))

    def capped(inner: Body, wanted: bool) -> ir.Value:
        if not wanted:
            return inner.op("Identity", scores)
        cap = inner.attribute("softcap")
        return inner.op("Mul", inner.op("Tanh", inner.op("Div", scores, cap)), cap)

    split = body.reshape(body.choose("softcap", lambda cap: cap > 0, capped), 0, 0, -1, tokens, total)
    weights = body.op("Softmax", body.op("Add", split, mask), axis=-1)
    found = body.op("MatMul", body.reshape(weights, 0, 0, -1, total), values)
    by_token = body.op("Transpose", body.reshape(found, 0, 0, -1, tokens, size), perm=[0, 3, 1, 2, 4])
    return body.reshape(by_token, 0, 0, -1)
