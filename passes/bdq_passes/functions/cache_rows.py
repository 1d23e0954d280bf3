"""Rows of the quantized KV cache (docs/ops.md, "One row")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.activations import inverse
from bdq_passes.functions.body import Body

TAIL = 4
"""Bytes of a row behind its codes."""
_END = np.iinfo(np.int64).max
_EXPONENTS = np.arange(64, dtype=np.float32)
_POWERS = np.float32(2) ** (_EXPONENTS - 32)
_TO_MANTISSA = np.float32(2) ** (42 - _EXPONENTS)
_FROM_MANTISSA = np.float32(2) ** (_EXPONENTS - 42)
_LEVELS = np.array([2**bits - 1 for bits in range(1, 9)], np.float32)
_STEPS = np.float32(1) / _LEVELS


def quantize_rows(body: Body, x: ir.Value, bits: str, clip: str) -> ir.Value:
    """Rows uint8 `[..., row]` of `x [B, S, heads, D]`; `bits` and `clip` are names of attributes."""
    at = body.op("Sub", body.attribute(bits), np.int64(1))
    high = body.op("Mul", body.op("ReduceMax", x, body.ints(-1), keepdims=1), body.attribute(clip))
    low = body.op("Mul", body.op("ReduceMin", x, body.ints(-1), keepdims=1), body.attribute(clip))
    step = body.op("Mul", body.op("Sub", high, low), body.op("Gather", _STEPS, at))
    largest = body.op("Max", body.op("Abs", high), body.op("Abs", low))
    scale = _encode(body, body.op("Max", step, body.op("Mul", largest, np.float32(2**-14)), np.float32(2**-32)))
    factor = inverse(body, _decode(body, scale))
    zero = body.op("Round", body.op("Mul", body.op("Neg", low), factor))
    shifted = body.op("Add", body.op("Round", body.op("Mul", x, factor)), zero)
    codes = body.op("Clip", shifted, np.float32(0), body.op("Gather", _LEVELS, at))
    tail = body.op("Concat", scale, body.op("Add", zero, np.float32(32768)), axis=-1)  # [..., 2]
    upper = body.op("Floor", body.op("Mul", tail, np.float32(1 / 256)))
    lower = body.op("Sub", tail, body.op("Mul", upper, np.float32(256)))
    pairs = [body.op("Unsqueeze", part, body.ints(-1)) for part in (lower, upper)]
    tail = body.reshape(body.op("Concat", *pairs, axis=-1), 0, 0, 0, TAIL)
    packed = body.choose(bits, int, lambda inner, width: _pack(inner, codes, width))
    return body.op("Concat", packed, body.op("Cast", tail, to=ir.DataType.UINT8), axis=-1)


def dequantize_rows(body: Body, rows: ir.Value, bits: str) -> ir.Value:
    """float32 `[..., D]` of rows uint8 `[..., row]`."""
    codes = body.op(
        "Cast", body.choose(bits, int, lambda inner, width: _unpack(inner, rows, width)), to=ir.DataType.FLOAT
    )
    tail = body.op("Cast", body.cut(rows, -1, -TAIL, _END), to=ir.DataType.FLOAT)
    scale_low, scale_high, zero_low, zero_high = body.ops("Split", tail, outputs=4, axis=-1, num_outputs=4)
    scale = body.op("Add", scale_low, body.op("Mul", scale_high, np.float32(256)))
    zero = body.op("Add", zero_low, body.op("Mul", zero_high, np.float32(256)))
    centred = body.op("Sub", codes, body.op("Sub", zero, np.float32(32768)))
    return body.op("Mul", centred, _decode(body, scale))


def _encode(body: Body, step: ir.Value) -> ir.Value:
    """16-bit scales, integers in float32, of `step [..., 1]`; its exponent is the number of powers of two up to it."""
    reached = body.op("Cast", body.op("LessOrEqual", _POWERS, step), to=ir.DataType.FLOAT)
    exponent = body.op("Sub", body.op("ReduceSum", reached, body.ints(-1), keepdims=1), np.float32(1))
    factor = body.op("Gather", _TO_MANTISSA, body.op("Cast", exponent, to=ir.DataType.INT64))
    mantissa = body.op("Round", body.op("Mul", step, factor))
    code = body.op("Add", body.op("Mul", exponent, np.float32(1024)), body.op("Sub", mantissa, np.float32(1024)))
    return body.op("Min", code, np.float32(65535))


def _decode(body: Body, code: ir.Value) -> ir.Value:
    """Scales float32 of their 16-bit codes, integers in float32."""
    exponent = body.op("Floor", body.op("Mul", code, np.float32(1 / 1024)))
    mantissa = body.op("Sub", code, body.op("Mul", exponent, np.float32(1024)))
    power = body.op("Gather", _FROM_MANTISSA, body.op("Cast", exponent, to=ir.DataType.INT64))
    return body.op("Mul", body.op("Add", mantissa, np.float32(1024)), power)


def _pack(body: Body, codes: ir.Value, bits: int) -> ir.Value:
    """Bytes of the planes of codes `[B, S, heads, D]`, integers in float32."""
    if bits == 8:
        return body.op("Cast", codes, to=ir.DataType.UINT8)
    if bits == 4:
        return _pack_plane(body, codes, 4)
    high = body.op("Floor", body.op("Mul", codes, np.float32(0.25)))
    low = body.op("Sub", codes, body.op("Mul", high, np.float32(4)))
    return body.op("Concat", _pack_plane(body, low, 2), _pack_plane(body, high, 1), axis=-1)


def _pack_plane(body: Body, values: ir.Value, bits: int) -> ir.Value:
    fields = 8 // bits
    weights = np.float32(2) ** (bits * np.arange(fields, dtype=np.float32))[:, None]
    weighted = body.op("Mul", body.reshape(values, 0, 0, 0, fields, -1), weights)
    return body.op("Cast", body.op("ReduceSum", weighted, body.ints(-2), keepdims=0), to=ir.DataType.UINT8)


def _unpack(body: Body, rows: ir.Value, bits: int) -> ir.Value:
    """Codes uint8 `[..., D]` of rows."""
    if bits == 8:
        return body.cut(rows, -1, 0, -TAIL)
    if bits == 4:
        return _unpack_plane(body, body.cut(rows, -1, 0, -TAIL), 4)
    border = body.op("Div", body.attribute("head_size"), np.int64(4))
    low = _unpack_plane(body, body.cut(rows, -1, 0, border), 2)
    high = _unpack_plane(body, body.cut(rows, -1, border, -TAIL), 1)
    return body.op("BitwiseOr", low, body.op("BitShift", high, np.uint8(2), direction="LEFT"))


def _unpack_plane(body: Body, plane: ir.Value, bits: int) -> ir.Value:
    fields, parts = 8 // bits, []
    for field in range(fields):
        part = plane if field == 0 else body.op("BitShift", plane, np.uint8(bits * field), direction="RIGHT")
        parts.append(part if field == fields - 1 else body.op("BitwiseAnd", part, np.uint8((1 << bits) - 1)))
    return body.op("Concat", *parts, axis=-1)
