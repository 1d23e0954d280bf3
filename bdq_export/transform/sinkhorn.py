"""Two-sided flatness: the row and column scales that give all rows and all columns of a matrix equal energy.

`V = diag(row) · A · diag(column)` has flat marginals: the energies of its rows are equal, those of its columns
too. It is the matrix-equilibration problem, solved by Sinkhorn's alternation on the squared entries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def equilibrate(matrix: Tensor, iterations: int = 50, tolerance: float = 1e-9) -> tuple[Tensor, Tensor]:
    """Positive scales `(row [N], column [K])`, float64, that equalise the energies of `matrix [N, K]`.

    Both have geometric mean 1 over the non-zero rows and columns; an all-zero row or column keeps scale 1. Stops
    when no scale moves by more than `tolerance` relatively in a step.

    Raises:
        ValueError: `matrix` is not two-dimensional or has NaN or infinite entries.
    """
    if matrix.dim() != 2:
        raise ValueError(f"equilibrate got a tensor of shape {tuple(matrix.shape)}, expected a matrix")
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError("equilibrate got a matrix with NaN or infinite entries, expected finite ones")
    energy = matrix.to(torch.float64).square()
    row, column = _inverse(energy.sum(1)), torch.ones(energy.shape[1], dtype=torch.float64)
    for _ in range(iterations):
        next_column = _inverse(energy.T @ row)
        next_row = _inverse(energy @ next_column)
        moved = max(_change(row, next_row), _change(column, next_column))
        row, column = next_row, next_column
        if moved < tolerance:
            break
    return row.sqrt(), column.sqrt()


def _inverse(energies: Tensor) -> Tensor:
    """1/energy scaled to geometric mean 1; 1 where the energy is 0."""
    live = energies > 0
    if not bool(live.any()):
        return torch.ones_like(energies)
    mean = energies[live].log().mean().exp()
    return torch.where(live, mean / torch.where(live, energies, 1.0), 1.0)


def _change(before: Tensor, after: Tensor) -> float:
    return float((after / before - 1).abs().amax())
