"""The block Hadamard transform (docs/ops.md, "Hadamard")."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.activations import minus_largest
from bdq_passes.functions.body import Array, Body

_LARGEST_LOG = 12
_LARGEST_MATRIX = 128
"""Larger transforms are done in two stages: H(a b) is the Kronecker product of H(b) and H(a)."""
_FACTOR = 32
"""b of those; measured."""
_PRIME = 37
"""Powers of two up to 2^35 leave different remainders."""
_ONE = np.float32(1)
_STEPS = np.array([2.0 ** -min(24 - log, 20) for log in range(_LARGEST_LOG + 1)], np.float32)
_MINUS_ROOTS = np.array([-1 / np.sqrt(np.float64(2**log)) for log in range(_LARGEST_LOG + 1)], np.float32)


def hadamard(
    body: Body,
    x: ir.Value,
    attribute: str,
    channels: ir.Value | None,
    axes: int | None,
    factor: ir.Value | np.generic = _ONE,
    interleave: str | None = None,
) -> ir.Value:
    """`x H / sqrt(n) * factor` of rows `x [..., K]`, n the value of an attribute; a factor of 1 changes no bit.

    Rows become integers so small that every sum of n of them is exact: no order of addition matters. `axes` is the
    number of axes in front of K and `channels` is K, where they are known: shapes are then known too, which `attention`
    says the use of. `-1 / -step` is `1 / step`: see `activations`. `interleave` is the attribute that says how many
    runs of channels take turns first.
    """
    if interleave is not None:
        x = _interleaved(body, x, interleave, channels, axes)
    log = _log2(body, body.attribute(attribute))
    minus_step = minus_largest(body, x, body.op("Gather", _STEPS, log, axis=0))
    grid = body.op("Round", body.op("Mul", x, body.op("Div", np.float32(-1), minus_step)))
    sums = body.choose(attribute, int, lambda inner, size: _sums(inner, grid, size, channels, axes))
    minus_root = body.op("Gather", _MINUS_ROOTS, log, axis=0)
    if factor is not _ONE:
        minus_root = body.op("Mul", minus_root, factor)
    return body.op("Mul", sums, body.op("Mul", minus_step, minus_root))


def _interleaved(body: Body, x: ir.Value, attribute: str, channels: ir.Value | None, axes: int | None) -> ir.Value:
    """Channels `[runs, K / runs]` of rows `x [..., K]` transposed, `runs` the value of an attribute."""

    def transposed(inner: Body, is_mixed: bool) -> ir.Value:
        if not is_mixed:
            return x
        runs = body.attribute(attribute)  # not the branch's constant, which need not divide K elsewhere
        if axes is not None:
            turned = inner.op("Transpose", inner.reshape(x, *[0] * axes, runs, -1), perm=[*range(axes), axes + 1, axes])
            return inner.reshape(turned, *[0] * axes, -1 if channels is None else channels)
        shape = inner.op("Shape", x)
        size = inner.op("Gather", shape, np.int64(-1), axis=0) if channels is None else channels
        rows = inner.reshape(x, -1, runs, inner.op("Div", size, runs))
        return inner.op("Reshape", inner.op("Transpose", rows, perm=[0, 2, 1]), shape)

    return body.choose(attribute, lambda given: given > 1, transposed)


def _sums(body: Body, x: ir.Value, size: int, channels: ir.Value | None, axes: int | None) -> ir.Value:
    """`x H` of rows `x [..., K]`."""
    lower = size if size <= _LARGEST_MATRIX else _FACTOR
    factors = (lower,) if lower == size else (size // lower, lower)
    if axes is None or channels is None:
        blocks = body.reshape(x, -1, *factors)
    else:
        blocks = body.reshape(x, *[0] * axes, body.op("Div", channels, np.int64(size)), *factors)
    sums = body.op("MatMul", blocks, _sylvester(lower))
    if lower < size:
        sums = body.op("MatMul", _sylvester(size // lower), sums)
    if axes is None or channels is None:
        return body.op("Reshape", sums, body.op("Shape", x))
    return body.reshape(sums, *[0] * axes, channels)


def _log2(body: Body, size: ir.Value) -> ir.Value:
    """The exponent of a power of two up to 4096, from the remainder that tells powers of two apart."""
    logs = np.zeros(_PRIME, np.int64)
    logs[2 ** np.arange(_LARGEST_LOG + 1) % _PRIME] = np.arange(_LARGEST_LOG + 1)
    return body.op("Gather", logs, body.op("Mod", size, np.int64(_PRIME)), axis=0)


def _sylvester(size: int) -> Array:
    """float32 `[size, size]`."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
