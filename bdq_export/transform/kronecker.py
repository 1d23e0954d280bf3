"""Matrices `left ⊗ right` in front of a linear: FlatQuant's transforms (arXiv 2410.09426, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from bdq_runtime.specs import Kronecker, OnlineTransform


def factor_sizes(channels: int) -> tuple[int, int]:
    """`n1 <= n2` with `n1 n2 = channels`, as near to each other as possible.

    Raises:
        ValueError: `channels` is not positive.
    """
    if channels < 1:
        raise ValueError(f"{channels} channels were to be factored, expected a positive number")
    left = next(size for size in range(math.isqrt(channels), 0, -1) if channels % size == 0)
    return left, channels // left


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 `[size, size]`: QR of a Gaussian, signs fixed so that it is unique."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(gaussian)
    # In rows, as a record gives it back: with columns one after another, products have other last bits.
    result: Tensor = (orthogonal * upper.diagonal().sign()).contiguous()
    return result


def random_kronecker(left: int, right: int | None, generator: torch.Generator) -> OnlineTransform:
    """A transform of random orthogonal factors of these sizes; None leaves the right one out."""
    first = random_orthogonal(left, generator).float().numpy()
    second = None if right is None else random_orthogonal(right, generator).float().numpy()
    return OnlineTransform(1, kronecker=Kronecker(first, second))


def kronecker_product(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """`x (left ⊗ right)` of `x` `[..., n1 n2]`; float32 also under autocast.

    Args:
        x: rows.
        left: `[n1, n1]`.
        right: `[n2, n2]`; None is the identity.
    """
    with torch.autocast("cpu", enabled=False):
        blocks = x.reshape(*x.shape[:-1], left.shape[0], -1)
        if right is not None:
            blocks = blocks @ right
        # The matrix comes second in both products, so that each is one large product instead of many small ones.
        return (blocks.transpose(-1, -2) @ left).transpose(-1, -2).reshape(x.shape)


def apply_kronecker(x: Tensor, kronecker: Kronecker) -> Tensor:
    """`x (left ⊗ right)` in the dtype of `x` `[..., K]`."""
    left, right = factors_of(kronecker, x.dtype)
    return kronecker_product(x, left, right)


def unapply_kronecker(weight: Tensor, kronecker: Kronecker) -> Tensor:
    """`W (left ⊗ right)⁻ᵀ` of `weight` `[N, K]`: what multiplies transformed inputs to the same outputs."""
    left, right = factors_of(kronecker, weight.dtype)
    return kronecker_product(weight, *inverse_factors(left, right))


def inverse_factors(left: Tensor, right: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`(left⁻ᵀ, right⁻ᵀ)`; gradients go through."""
    return torch.linalg.inv(left).T, None if right is None else torch.linalg.inv(right).T


def factors_of(kronecker: Kronecker, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Both matrices as tensors of `dtype`."""
    left, right = kronecker.left, kronecker.right
    return torch.from_numpy(left).to(dtype), None if right is None else torch.from_numpy(right).to(dtype)


def condition(factors: Iterable[Tensor | None]) -> float:
    """Condition number of the Kronecker product of `factors`; infinite where one is singular or not finite."""
    product = 1.0
    for factor in factors:
        if factor is None:
            continue
        exact = factor.detach().to(torch.float64)
        found = float(torch.linalg.cond(exact)) if bool(torch.isfinite(exact).all()) else math.inf
        product *= found
    return product if math.isfinite(product) else math.inf


def same_kronecker(one: Kronecker | None, other: Kronecker | None) -> bool:
    """Whether two are the same to the last bit."""
    if one is None or other is None:
        return one is other
    if (one.right is None) != (other.right is None) or not np.array_equal(one.left, other.left):
        return False
    return one.right is None or other.right is None or bool(np.array_equal(one.right, other.right))
