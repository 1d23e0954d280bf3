"""The online Hadamard transform on its integer grid: docs/ops.md, "Hadamard", bit for bit.

All partial sums are integers below 2^24, so any order of adding them, and so any factorisation of H, is exact.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from bdq_export.fake_quant.rounding import Rounding, nearest, single
from bdq_export.transform.hadamard import interleaved
from bdq_export.transform.kronecker import apply_kronecker
from bdq_runtime.opset import MAX_HADAMARD
from bdq_runtime.specs import OnlineTransform

_FACTOR = 64
"""Largest H that is one product: a bigger one is two smaller ones (Kronecker)."""
_LEAST_STEP = 1e-30


def largest_size(channels: int) -> int:
    """The largest block size that divides `channels`."""
    return min(channels & -channels, MAX_HADAMARD)


def online_hadamard(x: Tensor, size: int, rounding: Rounding = nearest) -> Tensor:
    """`x H / sqrt(size)` in blocks of `size` channels, of `x` `[..., K]` float32; the grid is one a row.

    Raises:
        ValueError: `size` is no power of two from 1 to 4096 that divides K.
    """
    if not 1 <= size <= MAX_HADAMARD or size & (size - 1) or x.shape[-1] % size:
        raise ValueError(
            f"Hadamard size is {size}, expected a power of two up to {MAX_HADAMARD} that divides {x.shape[-1]}"
        )
    exponent = min(24 - (size.bit_length() - 1), 20)
    step = (x.abs().amax(-1, keepdim=True) * 2.0**-exponent).clamp_min(_LEAST_STEP)
    values = rounding(x * (1.0 / step))
    return sylvester_product(values, size) * (step * single(1 / math.sqrt(size)))


def sylvester_product(values: Tensor, size: int) -> Tensor:
    """`values H` in blocks of `size` channels, unnormalised; exact for float32 integers whose sums stay below 2^24."""
    shape = values.shape
    right = min(size, _FACTOR)
    left = size // right
    # float32 also under autocast: bfloat16 does not hold the integers.
    with torch.autocast("cpu", enabled=False):
        result = values.reshape(-1, right) @ _sylvester(right, values.dtype)
        if left > 1:
            result = sylvester_product(result.reshape(-1, left, right).transpose(1, 2).reshape(-1, left), left)
            result = result.reshape(-1, right, left).transpose(1, 2)
    return result.reshape(shape)


def apply_online(x: Tensor, transform: OnlineTransform, rounding: Rounding = nearest) -> Tensor:
    """What a linear does to its inputs `[..., K]` float32 before it quantizes them.

    `Hadamard(x) * diagonal`, or `x (left ⊗ right)` in float32: equal to the file's up to the order of summation.
    """
    if transform.kronecker is not None:
        return apply_kronecker(x, transform.kronecker)
    rotated = online_hadamard(interleaved(x, transform.interleave), transform.hadamard_size, rounding)
    if transform.diagonal is None:
        return rotated
    return rotated * torch.from_numpy(transform.diagonal)


@cache
def _sylvester(size: int, dtype: torch.dtype) -> Tensor:
    """The ±1 matrix; never a tensor of inference mode, since autograd may have to save it."""
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=dtype)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix
