"""Equilibration gives rows and columns equal energies, and so lowers flatness."""

from __future__ import annotations

import pytest
import torch

from bdq_export.transform import equilibrate, flatness


def spiky(rows: int = 48, columns: int = 32) -> torch.Tensor:
    """Random entries with outlier rows and columns."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, columns, generator=generator).double()
    matrix *= torch.randn(rows, 1, generator=generator).double().mul(1.5).exp()
    return matrix * torch.randn(1, columns, generator=generator).double().mul(1.5).exp()


def test_equal_energies_and_flatter():
    matrix = spiky()
    row, column = equilibrate(matrix)
    flat = row[:, None] * matrix * column
    for axis in (0, 1):
        energy = flat.square().sum(axis)
        assert (energy / energy.mean() - 1).abs().amax().item() < 1e-6
    assert flatness(flat) < 0.5 * flatness(matrix)
    assert row.log().mean().item() == pytest.approx(0, abs=1e-12)
    assert column.log().mean().item() == pytest.approx(0, abs=1e-12)


def test_unchanged_by_scales_of_its_input():
    """diag(a) A diag(b) has the same flat form: the scales absorb a and b."""
    matrix = spiky()
    a = torch.rand(48, 1).double() + 0.1
    flat = [r[:, None] * m * c for m in (matrix, a * matrix) for r, c in [equilibrate(m)]]
    ratio = (flat[1] / flat[0]).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


def test_dead_rows_and_columns_keep_one():
    matrix = spiky()
    matrix[3] = 0
    matrix[:, 7] = 0
    row, column = equilibrate(matrix)
    assert row[3].item() == 1
    assert column[7].item() == 1
    assert bool(torch.isfinite(row).all())
    assert bool(torch.isfinite(column).all())
    zero_rows, zero_columns = equilibrate(torch.zeros(2, 3))
    assert torch.equal(zero_rows, torch.ones(2).double())
    assert torch.equal(zero_columns, torch.ones(3).double())


def test_bad_input():
    with pytest.raises(ValueError, match=r"shape \(4,\), expected a matrix"):
        equilibrate(torch.ones(4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        equilibrate(torch.full((2, 2), torch.nan))
