"""Steps on the manifold of orthogonal matrices: Cayley SGD, and the rotations of a model that it moves.

J. Li, L. Fuxin and S. Todorovic, "Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform"
(ICLR 2020), which SpinQuant (arXiv 2405.16406, section 3.2) learns its rotations with. For square matrices:

    Ĝ = G Rᵀ - ½ R Rᵀ G Rᵀ        Y = Ĝ - Ĝᵀ        R' = (I + α/2 Y)⁻¹ (I - α/2 Y) R

G is the gradient of the loss by R. Y is skew-symmetric, so that the Cayley transform of it is orthogonal, and
R' = R - α Y R to first order: steepest descent along the manifold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

_CONTRACTION = 0.5
"""q of algorithm 1: a step is no longer than 2 q / ‖Y‖."""
_LEAST_NORM = 1e-30


def cayley_step(rotation: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """`rotation` after one step of Cayley SGD, float64 `[n, n]`, as orthogonal as it was.

    The inverse is taken exactly (Li et al. iterate instead): n is the hidden size at most, and nothing drifts. The
    step is α = min(rate, 2 q / ‖Y‖₁) as in their algorithm 1.

    Args:
        rotation: orthogonal, float64 `[n, n]`.
        gradient: of the loss by `rotation`, `[n, n]`.
        rate: of learning, at least 0.
    """
    outer = gradient.to(torch.float64) @ rotation.T
    skew = (outer - outer.T) / 2  # Ĝ is half of G Rᵀ where R Rᵀ = I
    norm = float(torch.linalg.matrix_norm(skew, 1))
    half = min(rate, 2 * _CONTRACTION / max(norm, _LEAST_NORM)) / 2 * skew
    identity = torch.eye(len(rotation), dtype=torch.float64)
    moved: Tensor = torch.linalg.solve(identity + half, (identity - half) @ rotation)
    return moved


class Rotations:
    """R1 and R2 in float64, and float32 copies of them that gradients are taken of.

    Iterating gives the copies in order: R1, then R2 layer by layer.

    Attributes:
        residual: copy of R1 `[hidden, hidden]`.
        heads: layer -> copy of R2 `[head_dim, head_dim]`.

    Args:
        residual: R1, orthogonal.
        heads: layer -> R2, orthogonal.
    """

    def __init__(self, residual: Tensor, heads: Mapping[int, Tensor]) -> None:
        self._layers = tuple(heads)
        self._exact = [matrix.to(torch.float64) for matrix in (residual, *heads.values())]
        copies = [Parameter(matrix.float()) for matrix in self._exact]
        self.residual = copies[0]
        self.heads = dict(zip(self._layers, copies[1:], strict=True))

    def __iter__(self) -> Iterator[Parameter]:
        yield self.residual
        yield from self.heads.values()

    def exact(self) -> tuple[Tensor, dict[int, Tensor]]:
        """R1, and R2 by layer, in float64."""
        return self._exact[0], dict(zip(self._layers, self._exact[1:], strict=True))

    def values(self) -> list[Tensor]:
        """All matrices in order, float64."""
        return list(self._exact)

    def set_values(self, values: Sequence[Tensor]) -> None:
        """Go back to what `values()` gave."""
        self._exact = list(values)
        with torch.no_grad():
            for copy, matrix in zip(self, self._exact, strict=True):
                copy.copy_(matrix)

    def step(self, rate: float) -> None:
        """One Cayley step of every rotation against its gradient, which is dropped; without one it stays."""
        self.set_values(
            [
                matrix if copy.grad is None else cayley_step(matrix, copy.grad, rate)
                for copy, matrix in zip(self, self._exact, strict=True)
            ]
        )
        for copy in self:
            copy.grad = None
