"""Dynamic quantization of rows (docs/ops.md, "Activations")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

_MINUS_HIGH = np.array([-max(2 ** (bits - 1) - 1, 1) for bits in range(1, 9)], np.float32)


def quantize(body: Body, x: ir.Value, bits: ir.Value, clip: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Codes `[..., K]`, integers in float32, and scales `[..., 1]` of rows `x [..., K]`."""
    minus_high = body.op("Gather", _MINUS_HIGH, body.op("Sub", bits, np.int64(1)))
    factor = body.op("Div", body.op("Neg", clip), minus_high)
    largest = body.op("ReduceMax", body.op("Abs", x), body.ints(-1), keepdims=1)
    scale = body.op("Max", body.op("Mul", largest, factor), np.float32(1e-30))
    scaled = body.op("Round", body.op("Mul", x, inverse(body, scale)))
    low = body.op("Sub", minus_high, np.float32(1))
    return body.op("Clip", scaled, low, body.op("Neg", minus_high)), scale


def inverse(body: Body, x: ir.Value) -> ir.Value:
    """`1 / x`.

    Not written with a 1: ONNX Runtime turns `1 / x * y` into `y / x`, which rounds once instead of twice.
    """
    return body.op("Div", np.float32(-1), body.op("Neg", x))


def fake_quantize(body: Body, x: ir.Value) -> ir.Value:
    """`DynamicFakeQuantize`."""

    def quantized(inner: Body, is_float: bool) -> ir.Value:
        if is_float:
            return inner.op("Identity", x)
        codes, scale = quantize(inner, x, inner.attribute("bits"), inner.attribute("clip"))
        return inner.op("Mul", codes, scale)

    return body.choose("bits", lambda bits: bits == 16, quantized)
