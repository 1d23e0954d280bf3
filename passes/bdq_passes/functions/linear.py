"""The linear operators (docs/ops.md, "Linear operators")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions import panels
from bdq_passes.functions.activations import negated_codes, unsigned_codes
from bdq_passes.functions.body import Body
from bdq_passes.functions.hadamard import hadamard


def linear(body: Body, inputs: dict[str, ir.Value], axes: int | None) -> ir.Value:
    """`y` of any of the eight linear operators, told apart by their inputs and attributes.

    `axes` is the number of axes of x in front of K, or None.
    """
    x, gated = inputs["x"], "gate" in body.values
    if "diagonal" in inputs:
        x = body.op("Mul", hadamard(body, x, "hadamard_size", body.attribute("K"), axes), inputs["diagonal"])
    halves = 2 if gated else 1
    scale = panels.scales(body, inputs["scales"], halves)

    def integers(inner: Body, is_float: bool) -> ir.Value:
        if is_float:
            return _matmul(inner, x, inputs["weight"], scale, halves)
        bits, clip = inner.attribute("activation_bits"), inner.attribute("activation_clip")

        def scaled(block: Body, has_blocks: bool) -> ir.Value:
            if has_blocks:
                codes, step = negated_codes(block, x, bits, clip)
                return block.op("Mul", _matmul(block, codes, inputs["weight"], scale, halves), step)
            codes, step = unsigned_codes(block, x, bits, clip)
            sums = block.op("Cast", _matmul_integer(block, codes, inputs["weight"], halves), to=ir.DataType.FLOAT)
            return block.op("Mul", block.op("Mul", sums, step), block.reshape(scale, -1))

        return inner.choose("block_size", lambda size: size > 0, scaled)

    y = body.choose("activation_bits", lambda bits: bits == 16, integers)
    if "bias" in inputs:
        y = body.op("Add", y, inputs["bias"])
    return _gated(body, y) if gated else y


def _matmul_integer(body: Body, unsigned: ir.Value, weight: ir.Value, halves: int) -> ir.Value:
    """int32 `[..., halves * N]`: Σ q w of codes plus 128, exact on every processor.

    Activations are unsigned and weights signed, the form with fast kernels everywhere. Processors without 8-bit dot
    products add two products of it in 16 bits, so that weights must stay within 64: those of 8 bits are the sum of two,
    each of which multiplies the same activations.
    """
    unpacked, zero = panels.codes(body, weight, halves), np.uint8(128)

    def product(inner: Body, is_wide: bool) -> ir.Value:
        if not is_wide:
            return inner.op("MatMulInteger", unsigned, _signed(inner, unpacked, ir.DataType.INT8), zero)
        half = inner.op("Cast", inner.op("BitShift", unpacked, np.uint8(1), direction="RIGHT"), to=ir.DataType.INT8)
        lower = inner.op("Sub", half, np.int8(64))
        odd = inner.op("Cast", inner.op("BitwiseAnd", unpacked, np.uint8(1)), to=ir.DataType.INT8)
        both = inner.op("Concat", lower, inner.op("Add", lower, odd), axis=0)
        return inner.op("MatMulInteger", inner.op("Concat", unsigned, unsigned, axis=-1), both, zero)

    return body.choose("weight_bits", lambda bits: bits == 8, product)


def _signed(body: Body, codes: ir.Value, kind: ir.DataType) -> ir.Value:
    """The integers that codes stand for, of a type that holds twice the largest code."""
    values = body.op("Cast", codes, to=kind)
    one, grid = np.int64(1), body.attribute("weight_grid")
    power = body.op("Gather", 2 ** np.arange(8), body.op("Sub", body.attribute("weight_bits"), one), axis=0)
    zero = power
    if 1 in body.values["weight_grid"]:
        values = body.op("Mul", values, body.op("Cast", body.op("Add", grid, one), to=kind))
        zero = body.op("Where", body.op("Equal", grid, one), body.op("Sub", body.op("Add", power, power), one), power)
    return body.op("Sub", values, body.op("Cast", zero, to=kind))


def _matmul(body: Body, x: ir.Value, weight: ir.Value, scale: ir.Value, halves: int) -> ir.Value:
    """float32 `[..., halves * N]`: Σ x (w scale), in floats."""

    values = _signed(body, panels.codes(body, weight, halves), ir.DataType.FLOAT)

    def spread(inner: Body, has_blocks: bool) -> ir.Value:
        if not has_blocks:
            return inner.op("Identity", scale)
        columns = inner.op("Range", np.int64(0), inner.attribute("K"), np.int64(1))
        # ONNX Runtime divides constants also where an If does not go: never by 0
        size = inner.op("Max", inner.attribute("block_size"), np.int64(1))
        return inner.op("Gather", scale, inner.op("Div", columns, size), axis=0)

    return body.op("MatMul", x, body.op("Mul", values, body.choose("block_size", lambda size: size > 0, spread)))


def _gated(body: Body, y: ir.Value) -> ir.Value:
    """`act(g) * u` of `[g, u] = y [..., 2 N]`."""
    g, u = body.ops("Split", y, outputs=2, axis=-1, num_outputs=2)

    def activated(inner: Body, gate: str) -> ir.Value:
        if gate == "silu":
            return inner.op("Div", g, inner.op("Add", inner.op("Exp", inner.op("Neg", g)), np.float32(1)))
        cubic = inner.op("Mul", inner.op("Mul", inner.op("Mul", g, g), g), np.float32(0.044715))
        bent = inner.op("Tanh", inner.op("Mul", inner.op("Add", g, cubic), np.float32(np.sqrt(2 / np.pi))))
        return inner.op("Mul", inner.op("Mul", g, np.float32(0.5)), inner.op("Add", bent, np.float32(1)))

    return body.op("Mul", body.choose("gate", str, activated), u)
