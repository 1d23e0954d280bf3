"""The block Hadamard transform (docs/ops.md, "Hadamard")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.activations import inverse
from bdq_passes.functions.body import Array, Body

_LARGEST_LOG = 12
_FACTOR = 64
"""Larger transforms are done in two stages: H(a b) is the Kronecker product of H(b) and H(a)."""
_STEPS = np.array([2.0 ** -min(24 - log, 20) for log in range(_LARGEST_LOG + 1)], np.float32)
_ROOTS = np.array([1 / np.sqrt(np.float64(2**log)) for log in range(_LARGEST_LOG + 1)], np.float32)


def hadamard(body: Body, x: ir.Value, attribute: str) -> ir.Value:
    """`x H / sqrt(n)` of rows `x [..., K]`, n the value of an attribute.

    Rows become integers so small that every sum of n of them is exact: no order of addition matters.
    """
    size = body.attribute(attribute)
    powers = 2 ** np.arange(_LARGEST_LOG, dtype=np.int64)
    log = body.op("ReduceSum", body.op("Cast", body.op("Less", powers, size), to=ir.DataType.INT64), keepdims=0)
    largest = body.op("ReduceMax", body.op("Abs", x), body.ints(-1), keepdims=1)
    step = body.op("Max", body.op("Mul", largest, body.op("Gather", _STEPS, log)), np.float32(1e-30))
    grid = body.op("Round", body.op("Mul", x, inverse(body, step)))

    lower = body.op("Min", size, np.int64(_FACTOR))
    if max(int(n) for n in body.values[attribute]) <= _FACTOR:
        sums = body.op("MatMul", body.reshape(grid, -1, lower), _matrix(body, lower))
    else:
        upper = body.op("Div", size, lower)
        first = body.op("MatMul", body.reshape(grid, -1, upper, lower), _matrix(body, lower))
        sums = body.op("MatMul", _matrix(body, upper), first)
    summed = body.op("Reshape", sums, body.op("Shape", x))
    return body.op("Mul", summed, body.op("Mul", step, body.op("Gather", _ROOTS, log)))


def _matrix(body: Body, size: ir.Value) -> ir.Value:
    """float32 `[size, size]`, size at most 64: each Sylvester matrix is the corner of the next."""
    target = body.shape(size, size)
    corner = body.op("Slice", _sylvester(_FACTOR), body.ints(0, 0), target, body.ints(0, 1))
    return body.op("Cast", corner, to=ir.DataType.FLOAT)


def _sylvester(size: int) -> Array:
    matrix = np.ones((1, 1), np.int8)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
