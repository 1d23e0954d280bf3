"""Dynamic quantization of rows (docs/ops.md, "Activations").

Scales are computed with a minus in front and reciprocals as `-1 / -s`: of `1 / s * y` ONNX Runtime would make `y / s`,
which rounds only once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

_HIGH = np.array([max(2 ** (bits - 1) - 1, 1) for bits in range(1, 9)], np.float32)


def unsigned_codes(body: Body, x: ir.Value, bits: str, clip: str) -> tuple[ir.Value, ir.Value]:
    """Codes plus 128, uint8 `[..., K]`, and minus the scales `[..., 1]` of rows `x [..., K]`; names of attributes."""
    scaled, minus_step = _steps(body, x, bits, clip)
    return body.op("QuantizeLinear", scaled, np.float32(1), np.uint8(128)), minus_step


def float_codes(body: Body, x: ir.Value, bits: str, clip: str) -> tuple[ir.Value, ir.Value]:
    """Codes, integers in float32 `[..., K]`, and scales `[..., 1]` of rows `x [..., K]`; names of attributes."""
    scaled, minus_step = _steps(body, x, bits, clip)
    return body.op("Round", scaled), body.op("Neg", minus_step)


def _steps(body: Body, x: ir.Value, bits: str, clip: str) -> tuple[ir.Value, ir.Value]:
    """`x / s` of rows `x [..., K]`, clamped but not rounded yet, and `-s [..., 1]`."""
    high = body.op("Gather", _HIGH, body.op("Sub", body.attribute(bits), np.int64(1)), axis=0)
    minus_step = minus_largest(body, x, body.op("Div", body.attribute(clip), high))
    scaled = body.op("Mul", x, body.op("Div", np.float32(-1), minus_step))
    if min(float(value) for value in body.values[clip]) < 1:  # else the largest number is the last code
        low = body.op("Sub", np.float32(-1), high)
        scaled = body.op("Clip", scaled, low, high)
    return scaled, minus_step


def minus_largest(body: Body, x: ir.Value, factor: ir.Value) -> ir.Value:
    """`-max(max|x| * factor, 1e-30)` of each row: float32 `[..., 1]`. Two reductions take less than Abs and one."""
    high = body.op("Mul", body.op("ReduceMax", x, body.ints(-1), keepdims=1), body.op("Neg", factor))
    low = body.op("Mul", body.op("ReduceMin", x, body.ints(-1), keepdims=1), factor)
    return body.op("Min", high, low, np.float32(-1e-30))


def fake_quantize(body: Body, x: ir.Value) -> ir.Value:
    """`DynamicFakeQuantize`."""

    def quantized(inner: Body, is_float: bool) -> ir.Value:
        if is_float:
            return inner.op("Identity", x)
        return inner.op("Mul", *float_codes(inner, x, "bits", "clip"))

    return body.choose("bits", lambda bits: bits == 16, quantized)
