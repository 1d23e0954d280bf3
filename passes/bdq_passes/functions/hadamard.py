"""The block Hadamard transform (docs/ops.md, "Hadamard")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.activations import largest_step
from bdq_passes.functions.body import Array, Body

_LARGEST_LOG = 12
_LARGEST_MATRIX = 128
"""Larger transforms are done in two stages: H(a b) is the Kronecker product of H(b) and H(a)."""
_FACTOR = 32
"""a of those; measured."""
_STEPS = np.array([2.0 ** -min(24 - log, 20) for log in range(_LARGEST_LOG + 1)], np.float32)
_MINUS_ROOTS = np.array([-1 / np.sqrt(np.float64(2**log)) for log in range(_LARGEST_LOG + 1)], np.float32)


def hadamard(body: Body, x: ir.Value, attribute: str, channels: ir.Value | None, axes: int | None) -> ir.Value:
    """`x H / sqrt(n)` of rows `x [..., K]`, n the value of an attribute.

    Rows become integers so small that every sum of n of them is exact: no order of addition matters. `axes` is the
    number of axes in front of K and `channels` is K, where they are known: shapes are then known too, which `attention`
    says the use of. The reciprocal is negative: see `activations`.
    """
    size = body.attribute(attribute)
    log = _log2(body, size)
    step = largest_step(body, x, body.op("Gather", _STEPS, log, axis=0))
    grid = body.op("Round", body.op("Mul", x, body.op("Div", np.float32(-1), step)))
    lower, upper = _factors(body, attribute)
    if axes is None or channels is None:
        sums = body.op("Reshape", _sums(body, body.reshape(grid, -1, upper, lower), attribute), body.op("Shape", x))
    else:
        front = [0] * axes
        blocks = body.op("Div", channels, size)
        sums = body.reshape(_sums(body, body.reshape(grid, *front, blocks, upper, lower), attribute), *front, channels)
    return body.op("Mul", sums, body.op("Mul", step, body.op("Gather", _MINUS_ROOTS, log, axis=0)))


def _sums(body: Body, x: ir.Value, attribute: str) -> ir.Value:
    """`H(upper) x H(lower)` of `x [..., upper, lower]`."""
    lower, upper = _factors(body, attribute)
    sums = body.op("MatMul", x, _matrix(body, lower))
    return sums if _is_one_stage(body, attribute) else body.op("MatMul", _matrix(body, upper), sums)


def _factors(body: Body, attribute: str) -> tuple[ir.Value, ir.Value]:
    """Two powers of two whose product is the size, the second 1 where one stage is enough."""
    size = body.attribute(attribute)
    lower = size if _is_one_stage(body, attribute) else body.op("Min", size, np.int64(_FACTOR))
    return lower, body.op("Div", size, lower)


def _is_one_stage(body: Body, attribute: str) -> bool:
    return max(int(size) for size in body.values[attribute]) <= _LARGEST_MATRIX


def _log2(body: Body, size: ir.Value) -> ir.Value:
    """The exponent of a power of two up to 4096: how many of a row of 13 powers lie below it, by elimination."""
    log = body.constant(np.int64(0))
    for power in 2 ** np.arange(_LARGEST_LOG, dtype=np.int64):
        log = body.op("Add", log, body.op("Cast", body.op("Greater", size, power), to=ir.DataType.INT64))
    return log


def _matrix(body: Body, size: ir.Value) -> ir.Value:
    """float32 `[size, size]`, size at most 128: each Sylvester matrix is the corner of the next."""
    corner = body.op("Slice", _sylvester(_LARGEST_MATRIX), body.ints(0, 0), body.shape(size, size), body.ints(0, 1))
    return body.op("Cast", corner, to=ir.DataType.FLOAT)


def _sylvester(size: int) -> Array:
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
