"""The linear operators: what comes before, in and after their matmul (docs/ops.md, "Weights", "Linear operators")."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.opset import BLOCK_SIZES, GATES, WEIGHT_BITS
from bdq_runtime.panels import unpack_panels, unpack_scales
from bdq_runtime.reference.activations import quantize_activations
from bdq_runtime.reference.hadamard import hadamard

Array = npt.NDArray[Any]


def low_bit_linear(
    x: Array,
    weight: Array,
    scales: Array,
    *,
    n: int,
    weight_bits: int,
    activation_bits: int,
    weight_grid: int = 0,
    block_size: int = 0,
    activation_clip: float = 1.0,
    bias: Array | None = None,
    hadamard_size: int = 0,
    hadamard_interleave: int = 1,
    diagonal: Array | None = None,
    gate: str | None = None,
) -> Array:
    """`y [..., n]` float32 of `x [..., K]` float32, for weights and scales in panels.

    Args:
        x: rows.
        weight: uint8 `[P, C, 128 * weight_bits]`.
        scales: float16 `[P, B, 16]`.
        n: output channels; of each half when there is a gate.
        weight_bits: 2, 3, 4 or 8.
        activation_bits: 3, 4 or 8; 16 for float activations.
        weight_grid: 1 for the odd grid.
        block_size: columns of one scale; 0 for all of a row.
        activation_clip: part of the largest |x| of a row that its grid covers.
        bias: float32 `[n]`, `[2 n]` with a gate.
        hadamard_size: 0, or the size of the Hadamard transform of x.
        hadamard_interleave: runs of channels of x that take turns before it.
        diagonal: float32 `[K]`, multiplies what the Hadamard transform gives.
        gate: None, "silu" or "gelu_tanh".

    Raises:
        ValueError: an attribute or a shape that the operators do not have.
    """
    x = np.asarray(x, np.float32)
    if hadamard_size:
        x = hadamard(x, hadamard_size, hadamard_interleave)
    if diagonal is not None:
        x = x * diagonal
    rows = _rows_of_panels(n, gated=gate is not None)
    values = integer_weights(weight, weight_bits, weight_grid, rows, x.shape[-1])
    spread = unpack_scales(scales, 16 * scales.shape[0])[rows]
    y = _matmul(x, values, spread, block_size, activation_bits, activation_clip)
    if bias is not None:
        y = y + bias
    return y if gate is None else gated(y, gate)


def integer_weights(weight: Array, bits: int, grid: int, rows: Array, k: int) -> Array:
    """The integers that codes in panels stand for: int32 `[len(rows), k]`, `rows` counting from the first panel on."""
    if bits not in WEIGHT_BITS or grid not in ((0, 1) if bits < 8 else (0,)):
        raise ValueError(f"weights of {bits} bits on grid {grid}, expected 2, 3, 4 on grid 0 or 1, or 8 on grid 0")
    codes = unpack_panels(weight, bits, 16 * weight.shape[0], k)[rows].astype(np.int32)
    values: Array = codes - 2 ** (bits - 1) if grid == 0 else 2 * codes - (2**bits - 1)
    return values


def gated(y: Array, gate: str) -> Array:
    """`act(g) * u` for `[g, u] = y [..., 2 N]` float32."""
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r}, expected one of {GATES}")
    g, u = np.split(y.astype(np.float64), 2, axis=-1)
    if gate == "silu":
        with np.errstate(over="ignore"):
            activated = g / (1 + np.exp(-g))
    else:
        activated = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
    result: Array = (activated * u).astype(np.float32)
    return result


def _rows_of_panels(n: int, gated: bool) -> Array:
    """Where the output channels are, counting 16 a panel: panels of the gate and of the other half take turns."""
    channels = np.arange(n)
    if not gated:
        return channels
    first = channels // 16 * 32 + channels % 16
    return np.concatenate([first, first + 16])


def _matmul(x: Array, values: Array, scales: Array, block_size: int, bits: int, clip: float) -> Array:
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block size is {block_size}, expected one of {BLOCK_SIZES}")
    n, k = values.shape
    blocks = -(-k // block_size) if block_size else 1
    if scales.shape != (n, blocks):
        raise ValueError(f"scales of {scales.shape} channels and blocks, expected {(n, blocks)}")
    scale = scales.astype(np.float32)
    if bits == 16:
        spread = np.repeat(scale, block_size or k, axis=1)[:, :k].astype(np.float64)
        result: Array = (x.astype(np.float64) @ (values * spread).T).astype(np.float32)
        return result
    codes, step = quantize_activations(x, bits, clip)
    # float64 adds integers below 2^53 exactly, and much faster than NumPy adds int32
    integers, values = codes.astype(np.float64), values.astype(np.float64)
    if block_size == 0:
        result = ((integers @ values.T).astype(np.float32) * step) * scale[:, 0]
        return result
    total = np.zeros((*x.shape[:-1], n), np.float64)
    for block in range(blocks):
        columns = slice(block * block_size, (block + 1) * block_size)
        total += (integers[..., columns] @ values[:, columns].T) * scale[:, block].astype(np.float64)
    result = (total * step).astype(np.float32)
    return result
