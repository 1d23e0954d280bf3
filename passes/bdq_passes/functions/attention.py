"""Attention over a quantized KV cache (docs/ops.md, "Quantized-KV attention").

With few nodes, since ONNX Runtime spends more on a node than on its numbers when it decodes; and with operators whose
output shape follows from their inputs (CumSum rather than Range, Gather rather than Slice), since it looks for a buffer
to use again among all those whose shape it could not match before, which takes minutes in a model of many layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body
from bdq_passes.functions.cache_rows import Quantized, dequantize_rows, pack_codes, quantize_rows
from bdq_passes.functions.hadamard import hadamard

_HIGH = np.float32(2.0**30)
"""The slope of the limit of scores over positions: above any score half a position away from the last seen key."""
_HIDDEN = -60.0
"""The score of a key that is not seen, where the largest is not below 0: its weight of e^-60 is below any rounding."""


def attention(body: Body, inputs: dict[str, ir.Value]) -> Sequence[ir.Value]:
    """`output`, `present_key`, `present_value` of any of the four attention operators, told apart by their inputs."""
    query_key, value = _heads(body, inputs)
    total = body.op("Cast", inputs["total_sequence_length"], to=ir.DataType.INT64)
    positions = _positions(body, query_key, inputs["seqlens_k"], total)
    if "cos_cache" in inputs:
        query_key = _rotate(body, query_key, positions, inputs["cos_cache"], inputs["sin_cache"])

    factors = _factors(body)

    def transformed(inner: Body, wanted: int) -> ir.Value:
        if not wanted:
            return inner.op("Mul", query_key, factors)
        return hadamard(inner, query_key, "head_size", inner.attribute("head_size"), 3, factors)

    query_key = body.choose("hadamard", int, transformed)
    counts = body.shape(body.attribute("num_heads"), body.attribute("kv_num_heads"))
    query, key = body.ops("Split", query_key, counts, outputs=2, axis=2)
    quantized = _quantize(body, body.op("Concat", key, value, axis=2))
    rows = _rows(body, quantized)
    pasts = (inputs["past_key"], inputs["past_value"])
    presents = _append(body, pasts, rows, _places(body, inputs["seqlens_k"], positions), total)
    numbers = body.op("Range", np.int64(0), total, np.int64(1))
    keys, values = _dequantize(body, presents, numbers)
    own = body.cut(quantized.values, 2, 0, body.attribute("kv_num_heads"))
    output = _attend(body, query, own, keys, values, _limits(body, positions, numbers))
    return output, *presents


def _heads(body: Body, inputs: dict[str, ir.Value]) -> tuple[ir.Value, ir.Value]:
    """Query and key heads `[B, S, num_heads + kv_num_heads, D]`, value heads `[B, S, kv_num_heads, D]`."""
    size = body.attribute("head_size")
    if "qkv" in inputs:
        kv = body.attribute("kv_num_heads")
        counts = body.shape(body.op("Add", body.attribute("num_heads"), kv), kv)
        query_key, value = body.ops("Split", body.reshape(inputs["qkv"], 0, 0, -1, size), counts, outputs=2, axis=2)
        return query_key, value
    query_key = body.op("Concat", inputs["query"], inputs["key"], axis=-1)
    return body.reshape(query_key, 0, 0, -1, size), body.reshape(inputs["value"], 0, 0, -1, size)


def _factors(body: Body) -> ir.Value:
    """What heads of queries and keys are multiplied by: the scale, 1; float32 `[num_heads + kv_num_heads, 1]`."""
    heads = body.attribute("num_heads")
    numbers = body.op("Range", np.int64(0), body.op("Add", heads, body.attribute("kv_num_heads")), np.int64(1))
    factors = body.op("Where", body.op("Less", numbers, heads), body.attribute("scale"), np.float32(1))
    return body.reshape(factors, -1, 1)


def _positions(body: Body, heads: ir.Value, seqlens: ir.Value, total: ir.Value) -> ir.Value:
    """Where the tokens `heads [B, S, ...]` are: int64 `[B, S, 1]`."""
    last = body.op("Cast", body.op("Unsqueeze", seqlens, body.ints(1, 2)), to=ir.DataType.INT64)
    is_prompt = body.op("Equal", body.op("Shape", heads, start=1, end=2), total)
    last = body.op("Where", is_prompt, body.op("Sub", total, np.int64(1)), last)
    first_head = body.op("Slice", heads, body.ints(0), body.ints(1), body.ints(2))
    one_channel = body.op("ReduceMax", first_head, body.ints(3), keepdims=0)
    return body.op("Sub", last, _count(body, one_channel, 1, reverse=1))


def _count(body: Body, x: ir.Value, axis: int, reverse: int = 0) -> ir.Value:
    """0, 1, ... along an axis, or to 0: int64 in the shape of `x [..., 1]`, whatever is in it."""
    zeros = body.op("ArgMax", x, axis=-1, keepdims=1)
    return body.op("CumSum", body.op("Add", zeros, np.int64(1)), np.int64(axis), exclusive=1, reverse=reverse)


def _rotate(body: Body, x: ir.Value, positions: ir.Value, cos_cache: ir.Value, sin_cache: ir.Value) -> ir.Value:
    """RoPE of heads `[B, S, heads, D]`: the halves of the first rotary_dim channels turn.

    `x cos + swapped sin`, where sin has the sign of its half; channels that do not turn are multiplied by 1, and 0.
    """
    half = body.op("Shape", cos_cache, start=1, end=2)
    rest = body.op("Sub", body.op("Sub", body.shape(body.attribute("head_size")), half), half)
    size = body.op("Concat", body.op("Shape", cos_cache, start=0, end=1), rest, axis=0)
    one, zero = (body.op("ConstantOfShape", size, value=ir.tensor(np.array([fill], np.float32))) for fill in (1, 0))
    cos = body.op("Concat", cos_cache, cos_cache, one, axis=1)
    sin = body.op("Concat", body.op("Neg", sin_cache), sin_cache, zero, axis=1)
    cos, sin = (body.op("Gather", table, positions, axis=0) for table in (cos, sin))  # [B, S, 1, D]
    first, second, last = body.ops("Split", x, body.op("Concat", half, half, rest, axis=0), outputs=3, axis=3)
    swapped = body.op("Concat", second, first, last, axis=3)
    return body.op("Add", body.op("Mul", x, cos), body.op("Mul", swapped, sin))


def _quantize(body: Body, heads: ir.Value) -> Quantized:
    """Key heads and value heads `[B, S, 2 kv_num_heads, D]`, each with its bits and its clip."""
    kv = body.attribute("kv_num_heads")
    numbers = body.op("Range", np.int64(0), body.op("Add", kv, kv), np.int64(1))
    is_key = body.reshape(body.op("Less", numbers, kv), -1, 1)
    bits, clip = (
        body.op("Where", is_key, body.attribute(f"key_{name}"), body.attribute(f"value_{name}"))
        for name in ("bits", "clip")
    )
    return quantize_rows(body, heads, bits, clip)


def _rows(body: Body, quantized: Quantized) -> list[ir.Value]:
    """Cache rows uint8 `[B, kv_num_heads, S, row]` of keys and of values."""
    if _same_bits(body):
        rows = body.op("Concat", pack_codes(body, quantized.codes, "key_bits"), quantized.tail, axis=-1)
        return list(body.ops("Split", body.op("Transpose", rows, perm=[0, 2, 1, 3]), outputs=2, axis=1, num_outputs=2))
    codes, tails = (
        body.ops("Split", part, outputs=2, axis=2, num_outputs=2) for part in (quantized.codes, quantized.tail)
    )
    packed = [pack_codes(body, part, name) for part, name in zip(codes, ("key_bits", "value_bits"), strict=True)]
    rows_of = [body.op("Concat", part, tail, axis=-1) for part, tail in zip(packed, tails, strict=True)]
    return [body.op("Transpose", rows, perm=[0, 2, 1, 3]) for rows in rows_of]


def _same_bits(body: Body) -> bool:
    """Whether keys and values have the same number of bits in every node."""
    bits = body.values["key_bits"] | body.values["value_bits"]
    return len(bits) == 1


def _places(body: Body, seqlens: ir.Value, positions: ir.Value) -> ir.Value:
    """Batch row, head and position in the cache of each new row: int64 `[B, kv_num_heads, S, 3]`."""
    batch = _count(body, body.op("Unsqueeze", seqlens, body.ints(1)), 0)
    batch = body.op("Mul", body.op("Unsqueeze", batch, body.ints(2, 3)), body.ints(1, 0, 0))
    heads = body.op("Range", np.int64(0), body.attribute("kv_num_heads"), np.int64(1))
    heads = body.op("Mul", body.reshape(heads, -1, 1, 1), body.ints(0, 1, 0))
    position = body.op("Mul", body.op("Unsqueeze", positions, body.ints(1)), body.ints(0, 0, 1))
    return body.op("Add", body.op("Add", batch, heads), position)


def _append(
    body: Body, pasts: Sequence[ir.Value], rows: Sequence[ir.Value], places: ir.Value, total: ir.Value
) -> list[ir.Value]:
    """Each `past [B, heads, positions, row]` with rows `[B, heads, S, row]` at their places, longer if the text is."""
    have = body.op("Shape", pasts[0], start=2, end=3)
    missing = body.op("Sub", body.op("Max", have, total), have)
    room = body.op("Concat", body.ints(0, 0, 0, 0, 0, 0), missing, body.ints(0), axis=0)
    return [
        body.op("ScatterND", body.op("Pad", past, room, np.uint8(0)), places, new)
        for past, new in zip(pasts, rows, strict=True)
    ]


def _dequantize(body: Body, presents: Sequence[ir.Value], numbers: ir.Value) -> Sequence[ir.Value]:
    """Keys and values float32 `[B, kv_num_heads, 1, total, D]`; `numbers` are those of the positions."""
    if _same_bits(body):
        both = body.op("Unsqueeze", body.op("Concat", *presents, axis=1), body.ints(2))
        rows = body.op("Gather", both, numbers, axis=3)
        return body.ops("Split", dequantize_rows(body, rows, "key_bits"), outputs=2, axis=1, num_outputs=2)
    return [
        dequantize_rows(body, body.op("Gather", body.op("Unsqueeze", present, body.ints(2)), numbers, axis=3), name)
        for present, name in zip(presents, ("key_bits", "value_bits"), strict=True)
    ]


def _limits(body: Body, positions: ir.Value, numbers: ir.Value) -> ir.Value:
    """The largest score that a key may have: `_hidden` where a token does not see it, else more than any score;
    float32 `[B, 1, 1, S, keys]`.

    In floats, with operators that ONNX Runtime vectorizes (Where and comparisons are not among them).
    """
    at = body.op("Cast", body.op("Unsqueeze", positions, body.ints(1, 2)), to=ir.DataType.FLOAT)
    keys = body.op("Mul", body.op("Cast", numbers, to=ir.DataType.FLOAT), _HIGH)

    def limit(inner: Body, difference: ir.Value) -> ir.Value:
        return inner.op("Clip", difference, _hidden(inner), np.float32(np.finfo(np.float32).max))

    last = body.op("Mul", body.op("Add", at, np.float32(0.5)), _HIGH)
    later = limit(body, body.op("Sub", last, keys))

    def near(inner: Body, windowed: bool) -> ir.Value:
        if not windowed:
            return inner.op("Identity", later)
        size = inner.op("Cast", inner.attribute("local_window_size"), to=ir.DataType.FLOAT)
        first = inner.op("Sub", last, inner.op("Mul", size, _HIGH))
        return inner.op("Min", later, limit(inner, inner.op("Sub", keys, first)))

    return body.choose("local_window_size", lambda size: size > 0, near)


def _hidden(body: Body) -> ir.Value | np.generic:
    """The score of a key that is not seen: scores of which none is below 0 stay above it, and capped ones.

    Not minus infinity: powers of e that are no normal floats make a softmax four times slower.
    """
    return body.op("Sub", np.float32(_HIDDEN), body.op("Max", body.attribute("softcap"), np.float32(0)))


def _attend(body: Body, query: ir.Value, own: ir.Value, keys: ir.Value, values: ir.Value, limits: ir.Value) -> ir.Value:
    """`[B, S, num_heads * D]` of scaled query heads `[B, S, num_heads, D]` and the keys of the same tokens, over all
    keys and values `[B, kv_num_heads, 1, keys, D]`.
    """
    grouped = body.reshape(query, 0, 0, body.attribute("kv_num_heads"), -1, body.attribute("head_size"))

    def scores(inner: Body, is_capped: bool) -> ir.Value:
        if not is_capped:
            return _shifted_products(inner, grouped, own, keys)
        cap = inner.attribute("softcap")
        return inner.op("Mul", inner.op("Tanh", inner.op("Div", _products(inner, grouped, keys), cap)), cap)

    seen = body.op("Min", body.choose("softcap", lambda cap: cap > 0, scores), limits)
    weights = body.op("Softmax", seen, axis=-1)
    found = body.op("MatMul", weights, values)
    size = body.op("Mul", body.attribute("num_heads"), body.attribute("head_size"))
    return body.reshape(body.op("Transpose", found, perm=[0, 3, 1, 2, 4]), 0, 0, size)


def _shifted_products(body: Body, grouped: ir.Value, own: ir.Value, keys: ir.Value) -> ir.Value:
    """Scores minus each token's score of itself, which it always sees: no row has its largest below 0.

    The difference is one more channel: that score in queries, -1 in keys.
    """
    products = body.op("Mul", grouped, body.op("Unsqueeze", own, body.ints(3)))
    shift = body.op("ReduceSum", products, body.ints(-1), keepdims=1)
    longer = body.op("Pad", keys, body.ints(0, 0, 0, 0, 0, 0, 0, 0, 0, 1), np.float32(-1))
    return _products(body, body.op("Concat", grouped, shift, axis=-1), longer)


def _products(body: Body, grouped: ir.Value, keys: ir.Value) -> ir.Value:
    """`[B, kv_num_heads, G, S, keys]` of queries `[B, S, kv_num_heads, G, D]`, keys `[B, kv_num_heads, 1, keys, D]`."""
    turned = body.op("Transpose", keys, perm=[0, 1, 2, 4, 3])
    return body.op("MatMul", body.op("Transpose", grouped, perm=[0, 2, 3, 1, 4]), turned)
