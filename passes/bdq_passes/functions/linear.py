"""The linear operators (docs/ops.md, "Linear operators")."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from bdq_passes.functions import panels
from bdq_passes.functions.activations import float_codes, unsigned_codes
from bdq_passes.functions.body import Body
from bdq_passes.functions.hadamard import hadamard


def linear(body: Body, inputs: dict[str, ir.Value], axes: int | None) -> ir.Value:
    """`y` of any of the eight linear operators, told apart by their inputs and attributes.

    `axes` is the number of axes of x in front of K, or None. Gate and up rows are one matrix.
    """
    x, halves = inputs["x"], 2 if "gate" in body.values else 1
    if "diagonal" in inputs:
        x = body.op("Mul", hadamard(body, x, "hadamard_size", body.attribute("K"), axes), inputs["diagonal"])
    scales = panels.scales(body, inputs["scales"], halves)
    bits, clip = "activation_bits", "activation_clip"

    def by_activations(inner: Body, is_float: bool) -> ir.Value:
        if is_float:
            return _matmul(inner, x, inputs["weight"], scales, halves)

        def by_blocks(block: Body, has_blocks: bool) -> ir.Value:
            if has_blocks:
                codes, step = float_codes(block, x, bits, clip)
                return block.op("Mul", _matmul(block, codes, inputs["weight"], scales, halves), step)
            codes, minus_step = unsigned_codes(block, x, bits, clip)
            sums = block.op("Cast", _matmul_integer(block, codes, inputs["weight"], halves), to=ir.DataType.FLOAT)
            minus_scales = block.op("Neg", block.reshape(scales, -1))
            return block.op("Mul", block.op("Mul", sums, minus_step), minus_scales)

        return inner.choose("block_size", lambda size: size > 0, by_blocks)

    y = body.choose("activation_bits", lambda given: given == 16, by_activations)
    if "bias" in inputs:
        y = body.op("Add", y, inputs["bias"])
    return y if halves == 1 else _gated(body, *body.ops("Split", y, outputs=2, axis=-1, num_outputs=2))


def _by_bits(
    body: Body, x: ir.Value, weight: ir.Value, product: Callable[[Body, ir.Value, ir.Value, int], ir.Value]
) -> ir.Value:
    """`product(body, x, weight, bits)` for the number of bits of the weight."""
    return body.choose(
        "weight_bits", int, lambda inner, bits: product(inner, inner.if_taken(x, -1), inner.if_taken(weight, 1), bits)
    )


def _matmul_integer(body: Body, unsigned: ir.Value, weight: ir.Value, halves: int) -> ir.Value:
    """int32 `[..., N]`: Σ q w of activation codes plus 128, exact on every processor.

    Activations are unsigned and weights signed, the form with fast kernels everywhere. Processors without 8-bit dot
    products add two products of it in 16 bits, so that weights must stay within 64: those of 8 bits are the sum of two,
    each of which multiplies the same activations.
    """
    offset = np.uint8(128)

    def product(inner: Body, x: ir.Value, given: ir.Value, bits: int) -> ir.Value:
        codes = panels.codes(inner, given, halves, bits)
        if bits < 8:
            signed, zero = _levels(inner, codes, bits, ir.DataType.INT8)
            return inner.op("MatMulInteger", x, signed, offset, zero)
        half = inner.op("Cast", inner.op("BitShift", codes, np.uint8(1), direction="RIGHT"), to=ir.DataType.INT8)
        lower = inner.op("Sub", half, np.int8(64))
        odd = inner.op("Cast", inner.op("BitwiseAnd", codes, np.uint8(1)), to=ir.DataType.INT8)
        both = inner.op("Concat", lower, inner.op("Add", lower, odd), axis=0)
        return inner.op("MatMulInteger", inner.op("Concat", x, x, axis=-1), both, offset)

    return _by_bits(body, unsigned, weight, product)


def _levels(body: Body, codes: ir.Value, bits: int, kind: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """What has to be subtracted from what to give the integers that codes stand for, of a type that holds twice the
    largest code.
    """
    values, zero = body.op("Cast", codes, to=kind), np.array(2 ** (bits - 1), kind.numpy())
    if 1 not in body.values["weight_grid"]:
        return values, body.constant(zero)
    grid = body.op("Cast", body.attribute("weight_grid"), to=kind)
    doubled = body.op("Mul", values, body.op("Add", grid, np.array(1, kind.numpy())))
    # grid 1: twice the zero, minus 1
    return doubled, body.op("Add", body.op("Mul", grid, zero - np.array(1, kind.numpy())), zero)


def _matmul(body: Body, x: ir.Value, weight: ir.Value, scales: ir.Value, halves: int) -> ir.Value:
    """float32 `[..., N]`: Σ x (w scale), in floats."""

    def spread(inner: Body, has_blocks: bool) -> ir.Value:
        if not has_blocks:
            return inner.op("Identity", scales)
        columns = inner.op("Range", np.int64(0), inner.attribute("K"), np.int64(1))
        # ONNX Runtime divides constants also where an If does not go: never by 0
        size = inner.op("Max", inner.attribute("block_size"), np.int64(1))
        return inner.op("Gather", scales, inner.if_taken(inner.op("Div", columns, size), 0), axis=0)

    spread_scales = body.choose("block_size", lambda size: size > 0, spread)

    def product(inner: Body, x: ir.Value, given: ir.Value, bits: int) -> ir.Value:
        values, zero = _levels(inner, panels.codes(inner, given, halves, bits), bits, ir.DataType.FLOAT)
        scaled = inner.op("Mul", inner.op("Sub", values, zero), inner.if_taken(spread_scales, 0))
        return inner.op("MatMul", x, scaled)

    return _by_bits(body, x, weight, product)


def _gated(body: Body, g: ir.Value, u: ir.Value) -> ir.Value:
    """`act(g) * u`."""

    def activated(inner: Body, gate: str) -> ir.Value:
        if gate == "silu":
            return inner.op("Mul", g, inner.op("Sigmoid", g))
        cubic = inner.op("Mul", inner.op("Mul", inner.op("Mul", g, g), g), np.float32(0.044715))
        bent = inner.op("Tanh", inner.op("Mul", inner.op("Add", g, cubic), np.float32(np.sqrt(2 / np.pi))))
        return inner.op("Mul", inner.op("Mul", g, np.float32(0.5)), inner.op("Add", bent, np.float32(1)))

    return body.op("Mul", body.choose("gate", str, activated), u)
