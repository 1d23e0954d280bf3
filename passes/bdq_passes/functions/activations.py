"""Dynamic quantization of rows (docs/ops.md, "Activations").

Reciprocals are written as `-1 / s` and signs turned back later: ONNX Runtime would make `y / s` of `1 / s * y`, which
rounds once instead of twice. Rounding is symmetric, so nothing else changes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

_MINUS_HIGH = np.array([-max(2 ** (bits - 1) - 1, 1) for bits in range(1, 9)], np.float32)


def negated_steps(body: Body, x: ir.Value, bits: ir.Value, clip: ir.Value) -> tuple[ir.Value, ir.Value]:
    """`-round(x / s)` of rows `x [..., K]`, not clamped yet, and `s [..., 1]`; all float32."""
    factor = body.op("Div", body.op("Neg", clip), _minus_high(body, bits))
    largest = body.op("ReduceMax", body.op("Abs", x), body.ints(-1), keepdims=1)
    scale = body.op("Max", body.op("Mul", largest, factor), np.float32(1e-30))
    return body.op("Round", body.op("Mul", x, body.op("Div", np.float32(-1), scale))), scale


def unsigned_codes(body: Body, x: ir.Value, bits: ir.Value, clip: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes plus 128, uint8 `[..., K]`, and scales `[..., 1]` of rows `x [..., K]`."""
    steps, scale = negated_steps(body, x, bits, clip)
    minus_high, middle = _minus_high(body, bits), np.float32(128)
    low, high = body.op("Add", minus_high, middle - 1), body.op("Sub", middle, minus_high)
    return body.op("Cast", body.op("Clip", body.op("Sub", middle, steps), low, high), to=ir.DataType.UINT8), scale


def negated_codes(body: Body, x: ir.Value, bits: ir.Value, clip: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes times -1, integers in float32 `[..., K]`, and scales times -1 `[..., 1]` of rows `x [..., K]`."""
    steps, scale = negated_steps(body, x, bits, clip)
    minus_high = _minus_high(body, bits)
    codes = body.op("Clip", steps, minus_high, body.op("Sub", np.float32(1), minus_high))
    return codes, body.op("Neg", scale)


def fake_quantize(body: Body, x: ir.Value) -> ir.Value:
    """`DynamicFakeQuantize`."""

    def quantized(inner: Body, is_float: bool) -> ir.Value:
        if is_float:
            return inner.op("Identity", x)
        return inner.op("Mul", *negated_codes(inner, x, inner.attribute("bits"), inner.attribute("clip")))

    return body.choose("bits", lambda bits: bits == 16, quantized)


def _minus_high(body: Body, bits: ir.Value) -> ir.Value:
    return body.op("Gather", _MINUS_HIGH, body.op("Sub", bits, np.int64(1)), axis=0)
