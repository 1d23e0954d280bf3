"""Dynamic quantization of rows (docs/ops.md, "Activations").

Reciprocals are written as `-1 / -s`: of `1 / s * y` ONNX Runtime would make `y / s`, which rounds only once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

_MINUS_HIGH = np.array([-max(2 ** (bits - 1) - 1, 1) for bits in range(1, 9)], np.float32)


def steps(body: Body, x: ir.Value, bits: str, clip: str) -> tuple[ir.Value, ir.Value]:
    """`x / s` of rows `x [..., K]`, clamped but not rounded yet, and `s [..., 1]`; names of attributes."""
    minus_high = body.op("Gather", _MINUS_HIGH, body.op("Sub", body.attribute(bits), np.int64(1)), axis=0)
    scale = largest_step(body, x, body.op("Div", body.op("Neg", body.attribute(clip)), minus_high))
    scaled = body.op("Mul", x, inverse(body, scale))
    if min(float(value) for value in body.values[clip]) < 1:  # else the largest number is the last code
        low = body.op("Sub", minus_high, np.float32(1))
        scaled = body.op("Clip", scaled, low, body.op("Neg", minus_high))
    return scaled, scale


def unsigned_codes(body: Body, x: ir.Value, bits: str, clip: str) -> tuple[ir.Value, ir.Value]:
    """Codes plus 128, uint8 `[..., K]`, and scales `[..., 1]` of rows `x [..., K]`."""
    scaled, scale = steps(body, x, bits, clip)
    return body.op("QuantizeLinear", scaled, np.float32(1), np.uint8(128)), scale


def float_codes(body: Body, x: ir.Value, bits: str, clip: str) -> tuple[ir.Value, ir.Value]:
    """Codes, integers in float32 `[..., K]`, and scales `[..., 1]` of rows `x [..., K]`."""
    scaled, scale = steps(body, x, bits, clip)
    return body.op("Round", scaled), scale


def largest_step(body: Body, x: ir.Value, factor: ir.Value) -> ir.Value:
    """`max(max|x| * factor, 1e-30)` of each row: float32 `[..., 1]`. Two reductions take less than Abs and one."""
    high = body.op("Mul", body.op("ReduceMax", x, body.ints(-1), keepdims=1), factor)
    low = body.op("Mul", body.op("ReduceMin", x, body.ints(-1), keepdims=1), body.op("Neg", factor))
    return body.op("Max", high, low, np.float32(1e-30))


def inverse(body: Body, x: ir.Value) -> ir.Value:
    """`1 / x`."""
    return body.op("Div", np.float32(-1), body.op("Neg", x))


def fake_quantize(body: Body, x: ir.Value) -> ir.Value:
    """`DynamicFakeQuantize`."""

    def quantized(inner: Body, is_float: bool) -> ir.Value:
        if is_float:
            return inner.op("Identity", x)
        return inner.op("Mul", *float_codes(inner, x, "bits", "clip"))

    return body.choose("bits", lambda bits: bits == 16, quantized)
