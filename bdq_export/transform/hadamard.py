"""Random Hadamard rotations of any size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bdq_export.transform.kronecker import random_orthogonal


def hadamard(size: int) -> Tensor:
    """The orthogonal Sylvester-Hadamard matrix, float64 `[size, size]`.

    Raises:
        ValueError: `size` is no power of two.
    """
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard matrix of size {size} was asked for, expected a power of two")
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def random_hadamard(size: int, seed: int) -> Tensor:
    """A seeded rotation `diag(±1) · (Q ⊗ H)`, float64 `[size, size]`, orthogonal to rounding.

    H is the Hadamard matrix of the largest power of two that divides `size`; Q is a random orthogonal matrix
    (QR of a Gaussian, signs fixed so that it is unique) for the odd part, 1 for a power of two. The same size
    and seed give the same matrix.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a rotation of size {size} was asked for, expected a positive size")
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    matrix = hadamard(power)
    odd = size // power
    if odd > 1:
        matrix = torch.kron(random_orthogonal(odd, generator), matrix)
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix


def interleaved(x: Tensor, runs: int) -> Tensor:
    """`x` `[..., K]` with the channels of `runs` equal runs in turns; with `K // runs` in its place, back again."""
    return x if runs == 1 else x.reshape(*x.shape[:-1], runs, -1).transpose(-1, -2).flatten(-2)
