"""The linear operators (docs/ops.md, "Linear operators")."""

from __future__ import annotations

from dataclasses import dataclass

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
    x, gated = inputs["x"], "gate" in body.values
    if "diagonal" in inputs:
        x = body.op("Mul", hadamard(body, x, "hadamard_size", body.attribute("K"), axes), inputs["diagonal"])
    bits, clip = "activation_bits", "activation_clip"
    halves = _halves(body, inputs, gated)

    def by_activations(inner: Body, is_float: bool) -> list[ir.Value]:
        if is_float:
            return [_matmul(inner, x, half) for half in halves]

        def by_blocks(block: Body, has_blocks: bool) -> list[ir.Value]:
            if has_blocks:
                codes, step = float_codes(block, x, bits, clip)
                return [block.op("Mul", _matmul(block, codes, half), step) for half in halves]
            codes, step = unsigned_codes(block, x, bits, clip)
            return [_scaled(block, _matmul_integer(block, codes, half.codes), step, half.scales) for half in halves]

        return inner.choose_all("block_size", lambda size: size > 0, by_blocks)

    results = body.choose_all("activation_bits", lambda given: given == 16, by_activations)
    if "bias" in inputs:
        biases = body.ops("Split", inputs["bias"], outputs=2, axis=0, num_outputs=2) if gated else [inputs["bias"]]
        results = [body.op("Add", y, bias) for y, bias in zip(results, biases, strict=True)]
    return _gated(body, *results) if gated else results[0]


@dataclass(frozen=True, eq=False)
class _Half:
    """The weights of all output channels, or of the half that is the gate or the other.

    Attributes:
        codes: uint8 `[K, N]`.
        scales: float32 `[blocks, N]`.
    """

    codes: ir.Value
    scales: ir.Value


def _halves(body: Body, inputs: dict[str, ir.Value], gated: bool) -> list[_Half]:
    count = 2 if gated else 1
    codes = panels.codes(body, inputs["weight"], count)
    scales = panels.scales(body, inputs["scales"], count)
    return [_Half(code, scale) for code, scale in zip(codes, scales, strict=True)]


def _scaled(body: Body, sums: ir.Value, step: ir.Value, scales: ir.Value) -> ir.Value:
    floats = body.op("Cast", sums, to=ir.DataType.FLOAT)
    return body.op("Mul", body.op("Mul", floats, step), body.reshape(scales, -1))


def _matmul_integer(body: Body, unsigned: ir.Value, codes: ir.Value) -> ir.Value:
    """int32 `[..., N]`: Σ q w of activation codes plus 128, exact on every processor.

    Activations are unsigned and weights signed, the form with fast kernels everywhere. Processors without 8-bit dot
    products add two products of it in 16 bits, so that weights must stay within 64: those of 8 bits are the sum of two,
    each of which multiplies the same activations.
    """
    zero = np.uint8(128)

    def product(inner: Body, is_wide: bool) -> ir.Value:
        x, weights = inner.if_taken(unsigned, -1), inner.if_taken(codes, 0)
        if not is_wide:
            return inner.op("MatMulInteger", x, _signed(inner, weights, ir.DataType.INT8), zero)
        half = inner.op("Cast", inner.op("BitShift", weights, np.uint8(1), direction="RIGHT"), to=ir.DataType.INT8)
        lower = inner.op("Sub", half, np.int8(64))
        odd = inner.op("Cast", inner.op("BitwiseAnd", weights, np.uint8(1)), to=ir.DataType.INT8)
        both = inner.op("Concat", lower, inner.op("Add", lower, odd), axis=0)
        return inner.op("MatMulInteger", inner.op("Concat", x, x, axis=-1), both, zero)

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


def _matmul(body: Body, x: ir.Value, half: _Half) -> ir.Value:
    """float32 `[..., N]`: Σ x (w scale), in floats."""

    def spread(inner: Body, has_blocks: bool) -> ir.Value:
        if not has_blocks:
            return inner.op("Identity", half.scales)
        columns = inner.op("Range", np.int64(0), inner.attribute("K"), np.int64(1))
        # ONNX Runtime divides constants also where an If does not go: never by 0
        size = inner.op("Max", inner.attribute("block_size"), np.int64(1))
        return inner.op("Gather", half.scales, inner.if_taken(inner.op("Div", columns, size), 0), axis=0)

    x, weights = body.if_taken(x, -1), body.if_taken(half.codes, 0)
    scales = body.choose("block_size", lambda size: size > 0, spread)
    return body.op("MatMul", x, body.op("Mul", _signed(body, weights, ir.DataType.FLOAT), scales))


def _gated(body: Body, g: ir.Value, u: ir.Value) -> ir.Value:
    """`act(g) * u`."""

    def activated(inner: Body, gate: str) -> ir.Value:
        if gate == "silu":
            return inner.op("Mul", g, inner.op("Sigmoid", g))
        cubic = inner.op("Mul", inner.op("Mul", inner.op("Mul", g, g), g), np.float32(0.044715))
        bent = inner.op("Tanh", inner.op("Mul", inner.op("Add", g, cubic), np.float32(np.sqrt(2 / np.pi))))
        return inner.op("Mul", inner.op("Mul", g, np.float32(0.5)), inner.op("Add", bent, np.float32(1)))

    return body.op("Mul", body.choose("gate", str, activated), u)
