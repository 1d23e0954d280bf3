"""The linear operators (docs/ops.md, "Linear operators")."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from bdq_passes.functions import panels
from bdq_passes.functions.activations import float_codes, unsigned_codes
from bdq_passes.functions.body import Body
from bdq_passes.functions.hadamard import hadamard


def linear(body: Body, inputs: dict[str, ir.Value], axes: int | None) -> ir.Value:
    """`y` of any of the eight linear operators, told apart by their inputs and attributes.

    `axes` is the number of axes of x in front of K, or None.
    """
    x, halves = inputs["x"], 2 if "gate" in body.values else 1
    if "diagonal" in inputs:
        rotated = hadamard(body, x, "hadamard_size", body.attribute("K"), axes, interleave="hadamard_interleave")
        x = body.op("Mul", rotated, inputs["diagonal"])
    scales = _halves(body, panels.scales(body, inputs["scales"], halves), halves)
    bits, clip = "activation_bits", "activation_clip"

    def by_activations(inner: Body, is_float: bool) -> list[ir.Value]:
        if is_float:
            return _matmul(inner, x, inputs["weight"], scales)

        def by_blocks(block: Body, has_blocks: bool) -> list[ir.Value]:
            if has_blocks:
                codes, step = float_codes(block, x, bits, clip)
                return [block.op("Mul", y, step) for y in _matmul(block, codes, inputs["weight"], scales)]
            codes, minus_step = unsigned_codes(block, x, bits, clip)
            sums = _matmul_integer(block, codes, inputs["weight"], halves)
            return [_scaled(block, acc, minus_step, half) for acc, half in zip(sums, scales, strict=True)]

        return inner.choose_all("block_size", lambda size: size > 0, by_blocks)

    results = body.choose_all("activation_bits", lambda given: given == 16, by_activations)
    if "bias" in inputs:
        results = [body.op("Add", *pair) for pair in zip(results, _halves(body, inputs["bias"], halves), strict=True)]
    return results[0] if halves == 1 else _gated(body, *results)


def _halves(body: Body, x: ir.Value, halves: int) -> Sequence[ir.Value]:
    """The gate's half of the last axis and the other one, or all of it.

    Two products, since what fits into a cache is faster: one of twice the channels took 1.4 times as long.
    """
    return [x] if halves == 1 else body.ops("Split", x, outputs=halves, axis=-1, num_outputs=halves)


def _scaled(body: Body, sums: ir.Value, minus_step: ir.Value, scales: ir.Value) -> ir.Value:
    floats = body.op("Cast", sums, to=ir.DataType.FLOAT)
    return body.op("Mul", body.op("Mul", floats, minus_step), body.op("Neg", body.reshape(scales, -1)))


def _by_bits(
    body: Body, x: ir.Value, weight: ir.Value, products: Callable[[Body, ir.Value, ir.Value, int], list[ir.Value]]
) -> list[ir.Value]:
    """`products(body, x, weight, bits)` for the number of bits of the weight."""

    def build(inner: Body, bits: int) -> list[ir.Value]:
        return products(inner, inner.if_taken(x, -1), inner.if_taken(weight, 1), bits)

    return body.choose_all("weight_bits", int, build)


def _matmul_integer(body: Body, unsigned: ir.Value, weight: ir.Value, halves: int) -> list[ir.Value]:
    """int32 `[..., N]` of each half: Σ q w of activation codes plus 128, exact on every processor.

    Activations are unsigned and weights signed, the form with fast kernels everywhere. Processors without 8-bit dot
    products add two products of it in 16 bits, so that weights must stay within 64: those of 8 bits are the sum of two,
    each of which multiplies the same activations.
    """
    offset = np.uint8(128)

    def products(inner: Body, x: ir.Value, given: ir.Value, bits: int) -> list[ir.Value]:
        codes = panels.codes(inner, given, halves, bits)
        if bits < 8:
            signed, zero = _levels(inner, codes, bits, ir.DataType.INT8)
            return [inner.op("MatMulInteger", x, half, offset, zero) for half in _halves(inner, signed, halves)]
        rounded = inner.op("Cast", inner.op("BitShift", codes, np.uint8(1), direction="RIGHT"), to=ir.DataType.INT8)
        lower = inner.op("Sub", rounded, np.int8(64))
        odd = inner.op("Cast", inner.op("BitwiseAnd", codes, np.uint8(1)), to=ir.DataType.INT8)
        both = inner.op("Concat", lower, inner.op("Add", lower, odd), axis=0)
        twice = inner.op("Concat", x, x, axis=-1)
        return [inner.op("MatMulInteger", twice, half, offset) for half in _halves(inner, both, halves)]

    return _by_bits(body, unsigned, weight, products)


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


def _matmul(body: Body, x: ir.Value, weight: ir.Value, scales: Sequence[ir.Value]) -> list[ir.Value]:
    """float32 `[..., N]` of each half: Σ x (w scale), in floats."""

    def spread(inner: Body, has_blocks: bool) -> list[ir.Value]:
        if not has_blocks:
            return [inner.op("Identity", half) for half in scales]
        columns = inner.op("Range", np.int64(0), inner.attribute("K"), np.int64(1))
        # ONNX Runtime divides constants also where an If does not go: never by 0
        size = inner.op("Max", inner.attribute("block_size"), np.int64(1))
        rows = inner.if_taken(inner.op("Div", columns, size), 0)
        return [inner.op("Gather", half, rows, axis=0) for half in scales]

    spread_scales = body.choose_all("block_size", lambda size: size > 0, spread)

    def products(inner: Body, x: ir.Value, given: ir.Value, bits: int) -> list[ir.Value]:
        values, zero = _levels(inner, panels.codes(inner, given, len(scales), bits), bits, ir.DataType.FLOAT)
        parts = _halves(inner, inner.op("Sub", values, zero), len(scales))
        taken = [inner.if_taken(half, 0) for half in spread_scales]
        return [inner.op("MatMul", x, inner.op("Mul", *pair)) for pair in zip(parts, taken, strict=True)]

    return _by_bits(body, x, weight, products)


def _gated(body: Body, g: ir.Value, u: ir.Value) -> ir.Value:
    """`act(g) * u`."""

    def activated(inner: Body, gate: str) -> ir.Value:
        if gate == "silu":
            return inner.op("Mul", g, inner.op("Sigmoid", g))
        cubic = inner.op("Mul", inner.op("Mul", inner.op("Mul", g, g), g), np.float32(0.044715))
        bent = inner.op("Tanh", inner.op("Mul", inner.op("Add", g, cubic), np.float32(np.sqrt(2 / np.pi))))
        return inner.op("Mul", inner.op("Mul", g, np.float32(0.5)), inner.op("Add", bent, np.float32(1)))

    return body.op("Mul", body.choose("gate", str, activated), u)
