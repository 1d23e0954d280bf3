"""The block Hadamard transform on a grid so fine that its sums are exact (docs/ops.md, "Hadamard"): exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.opset import MAX_HADAMARD

Array = npt.NDArray[Any]

_SMALLEST_STEP = np.float32(1e-30)
_MANTISSA_BITS = 24


def sylvester(size: int) -> Array:
    """The matrix of Sylvester's construction, entries 1 and -1: float32 `[size, size]`.

    Raises:
        ValueError: the size is no power of two up to 4096.
    """
    if size < 1 or size & (size - 1) or size > MAX_HADAMARD:
        raise ValueError(f"Hadamard size is {size}, expected a power of two up to {MAX_HADAMARD}")
    matrix = np.ones((1, 1), np.float32)
    while matrix.shape[0] < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def grid_bits(size: int) -> int:
    """R: rows are rounded to 2^R steps on each side of zero, so that `size` of them add up to a float exactly."""
    return min(_MANTISSA_BITS - (size.bit_length() - 1), 20)


def interleaved(x: Array, runs: int) -> Array:
    """Channels `[runs, K / runs]` of `x [..., K]` transposed: the first of each run, then the second of each, ...

    Raises:
        ValueError: the number of runs is not positive, or does not divide K.
    """
    k = x.shape[-1]
    if runs < 1 or k % runs:
        raise ValueError(f"{k} channels in {runs} runs, expected a positive divisor")
    found: Array = x.reshape(*x.shape[:-1], runs, k // runs).swapaxes(-1, -2).reshape(x.shape)
    return found


def hadamard(x: Array, size: int, interleave: int = 1) -> Array:
    """`x H / sqrt(size)` for each `size` consecutive channels of `x [..., K]` float32, interleaved first.

    Raises:
        ValueError: the size is no power of two up to 4096, or it or `interleave` does not divide K.
    """
    matrix = sylvester(size)
    x = interleaved(np.asarray(x, np.float32), interleave)
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} channels, expected a multiple of the Hadamard size {size}")
    largest = np.abs(x).max(-1, keepdims=True, initial=np.float32(0))
    step = np.maximum(largest * np.float32(2.0 ** -grid_bits(size)), _SMALLEST_STEP)
    grid = np.rint(x * (np.float32(1) / step))
    summed = (grid.reshape(*x.shape[:-1], -1, size) @ matrix).reshape(x.shape)
    result: Array = summed * (step * np.float32(1 / np.sqrt(np.float64(size))))
    return result
