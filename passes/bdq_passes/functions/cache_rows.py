"""Rows of the quantized KV cache (docs/ops.md, "One row")."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

_END = np.iinfo(np.int64).max
_EXPONENTS = np.arange(64, dtype=np.float32)
_POWERS = np.float32(2) ** (_EXPONENTS - 32)
_LARGEST_STEP = np.float32(2047 * 2.0**21)
"""What code 65535 stands for: whatever is larger gets it."""
# by the number of powers of two up to a step, which is its exponent plus 1; no step lies below the first power
_TO_MANTISSA = np.float32(2) ** (43 - np.arange(65, dtype=np.float32))
_CODE_OF_MANTISSA_0 = 1024 * np.arange(65, dtype=np.float32) - 2048
# by the upper byte of a 16-bit scale: 6 bits of exponent, the first 2 of the mantissa
_UPPER = np.arange(256)
_STEP_OF_LOWER_BYTE = np.float32(2) ** (_UPPER // 4 - 42).astype(np.float32)
_SCALE_OF_UPPER_BYTE = (1024 + 256 * (_UPPER % 4)).astype(np.float32) * _STEP_OF_LOWER_BYTE
_LEVELS = np.array([2**bits - 1 for bits in range(1, 9)], np.float32)
_BYTES = np.array([[1, 1 / 256, 0, 0], [0, 0, 1, 1 / 256]], np.float32)
_OF_BYTES = np.array([[1], [256]], np.float32)


@dataclass(frozen=True, eq=False)
class Quantized:
    """Rows before their codes are packed.

    Attributes:
        codes: integers in float32 `[..., D]`.
        tail: uint8 `[..., 4]`.
        values: float32 `[..., D]`, what the rows stand for.
    """

    codes: ir.Value
    tail: ir.Value
    values: ir.Value


def quantize_rows(body: Body, x: ir.Value, bits: ir.Value, clip: ir.Value) -> Quantized:
    """The rows of the last axis of `x [..., heads, D]`.

    `bits` int64 and `clip` float32 are `[heads, 1]`. Reciprocals are negative: see `activations`.
    """
    levels = body.op("Gather", _LEVELS, body.op("Sub", bits, np.int64(1)), axis=0)
    high = body.op("Mul", body.op("ReduceMax", x, body.ints(-1), keepdims=1), clip)
    low = body.op("Mul", body.op("ReduceMin", x, body.ints(-1), keepdims=1), clip)
    step = body.op("Mul", body.op("Sub", high, low), body.op("Div", np.float32(-1), body.op("Neg", levels)))
    # the larger of |high| and |low| is that of high and -low
    largest = body.op("Mul", high, np.float32(2**-14)), body.op("Mul", low, np.float32(-(2**-14)))
    step = body.op("Clip", body.op("Max", step, *largest), np.float32(2**-32), _LARGEST_STEP)
    code, scale = _encode(body, step)
    minus_inverse = body.op("Div", np.float32(-1), scale)
    zero = body.op("Round", body.op("Mul", low, minus_inverse))
    codes = body.op("Sub", zero, body.op("Round", body.op("Mul", x, minus_inverse)))
    codes = body.op("Min", body.op("Max", codes, np.float32(0)), levels)
    tail = body.op("Concat", code, body.op("Add", zero, np.float32(32768)), axis=-1)  # [..., 2]
    # exact: products by powers of two, and sums with 0; a cast between integers drops the upper bits
    pieces = body.op("Cast", body.op("MatMul", tail, _BYTES), to=ir.DataType.INT32)
    tail = body.op("Cast", pieces, to=ir.DataType.UINT8)
    return Quantized(codes, tail, body.op("Mul", body.op("Sub", codes, zero), scale))


def pack_codes(body: Body, codes: ir.Value, bits: str) -> ir.Value:
    """Bytes of the planes of codes `[..., D]`, integers in float32; `bits` is the name of an attribute."""
    return body.choose(bits, int, lambda inner, width: _pack(inner, codes, width))


def dequantize_rows(body: Body, rows: ir.Value, bits: str) -> ir.Value:
    """float32 `[..., D]` of rows uint8 `[..., row]`; `bits` is the name of an attribute."""
    size = body.op("Div", body.op("Mul", body.attribute("head_size"), body.attribute(bits)), np.int64(8))
    counts = body.op("Concat", body.shape(size), body.ints(1, 1, 2), axis=0)
    packed, lower, upper, zero = body.ops("Split", rows, counts, outputs=4, axis=-1)
    unpacked = body.choose(bits, int, lambda inner, width: _unpack(inner, packed, width))
    lower = body.op("Cast", lower, to=ir.DataType.FLOAT)
    upper = body.op("Cast", upper, to=ir.DataType.INT32)
    scale = body.op(
        "Add",
        body.op("Gather", _SCALE_OF_UPPER_BYTE, upper, axis=0),
        body.op("Mul", lower, body.op("Gather", _STEP_OF_LOWER_BYTE, upper, axis=0)),
    )
    zero = body.op("MatMul", body.op("Cast", zero, to=ir.DataType.FLOAT), _OF_BYTES)
    zero = body.op("Sub", zero, np.float32(32768))
    return body.op("Mul", body.op("Sub", body.op("Cast", unpacked, to=ir.DataType.FLOAT), zero), scale)


def _encode(body: Body, step: ir.Value) -> tuple[ir.Value, ir.Value]:
    """16-bit scales, integers in float32, of `step [..., 1]`, and the scales that they stand for."""
    reached = body.op("Cast", body.op("LessOrEqual", _POWERS, step), to=ir.DataType.INT32)
    count = body.op("ReduceSum", reached, body.ints(-1), keepdims=1)
    power = body.op("Gather", _TO_MANTISSA, count, axis=0)
    mantissa = body.op("Round", body.op("Mul", step, power))
    code = body.op("Add", mantissa, body.op("Gather", _CODE_OF_MANTISSA_0, count, axis=0))
    return code, body.op("Div", mantissa, power)  # by a power of two: exact


def _pack(body: Body, codes: ir.Value, bits: int) -> ir.Value:
    if bits == 8:
        return body.op("Cast", codes, to=ir.DataType.UINT8)
    if bits == 4:
        return _pack_plane(body, codes, 4)
    high = body.op("Floor", body.op("Mul", codes, np.float32(0.25)))
    low = body.op("Sub", codes, body.op("Mul", high, np.float32(4)))
    return body.op("Concat", _pack_plane(body, low, 2), _pack_plane(body, high, 1), axis=-1)


def _pack_plane(body: Body, values: ir.Value, bits: int) -> ir.Value:
    fields = body.ops("Split", values, outputs=8 // bits, axis=-1, num_outputs=8 // bits)
    packed = fields[-1]
    for field in reversed(fields[:-1]):
        packed = body.op("Add", body.op("Mul", packed, np.float32(2**bits)), field)
    return body.op("Cast", packed, to=ir.DataType.UINT8)


def _unpack(body: Body, packed: ir.Value, bits: int) -> ir.Value:
    """Codes uint8 `[..., D]` of the planes of rows."""
    if bits == 8:
        return body.op("Identity", packed)
    if bits == 4:
        return _unpack_plane(body, packed, 4)
    border = body.op("Div", body.attribute("head_size"), np.int64(4))
    low = _unpack_plane(body, body.cut(packed, -1, 0, border), 2)
    high = _unpack_plane(body, body.cut(packed, -1, border, _END), 1)
    return body.op("BitwiseOr", low, body.op("BitShift", high, np.uint8(2), direction="LEFT"))


def _unpack_plane(body: Body, plane: ir.Value, bits: int) -> ir.Value:
    fields, parts = 8 // bits, []
    for field in range(fields):
        part = plane if field == 0 else body.op("BitShift", plane, np.uint8(bits * field), direction="RIGHT")
        parts.append(part if field == fields - 1 else body.op("BitwiseAnd", part, np.uint8((1 << bits) - 1)))
    return body.op("Concat", *parts, axis=-1)
