"""Two-sided rounding is Babai's nearest plane on the Kronecker product, and pays where outputs are coupled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdq_export.quantize.gptq import GptqOptions, gptq, output_factor
from bdq_export.quantize.grid import Grid, searched_grid
from bdq_export.quantize.nearest_plane import NearestPlane, plain_codes
from bdq_runtime.packing import ODD, PerBlock, PerChannel, QuantSpec

TOKENS = 1 << 20
SPECS = [
    QuantSpec(4, PerChannel()),
    QuantSpec(3, PerChannel(), grid=ODD),
    QuantSpec(4, PerBlock(16), symmetric=False),
    QuantSpec(2, PerBlock(16)),
]


def moments(size: int, seed: int, samples: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator) + torch.randn(1, size, generator=generator)
    values = torch.randn(samples, size, generator=generator) @ mix
    return values.T @ values / samples


def normal(rows: int, columns: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def damped(matrix: torch.Tensor, share: float) -> np.ndarray:
    return (matrix.double() + share * matrix.double().diagonal().mean() * torch.eye(len(matrix))).numpy()


def nearest_plane(weight: torch.Tensor, grid: Grid, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Codes `[N, K]` by the textbook algorithm on vec(W), one column after the other, with the Hessian right x left."""
    rows, columns = weight.shape
    factor = np.linalg.cholesky(np.linalg.inv(np.kron(right, left))).T  # upper, inverse = factor.T @ factor
    rest = weight.double().numpy().T.reshape(-1).copy()
    steps, zeros = (
        np.repeat(part.double().numpy(), grid.spec.block_size(columns), axis=1)[:, :columns].T.reshape(-1)
        for part in (grid.steps, grid.zero_points)
    )
    codes = np.empty_like(rest)
    for index in range(rows * columns):
        code = np.rint(rest[index] / steps[index] + zeros[index])
        codes[index] = np.clip(code, 0, 2**grid.spec.bits - 1)
        error = (rest[index] - (codes[index] - zeros[index]) * steps[index]) / factor[index, index]
        rest[index:] -= error * factor[index, index:]
    return codes.reshape(columns, rows).T


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_those_of_the_nearest_plane_on_the_kronecker_product(spec: QuantSpec) -> None:
    weight, inputs, outputs = normal(12, 32), moments(32, 1), moments(12, 2)
    grid = searched_grid(weight, spec)
    done = gptq(weight, inputs, spec, GptqOptions(act_order=False), grid, [output_factor(outputs, TOKENS)])
    expected = nearest_plane(weight, grid, damped(outputs, 0.02), damped(inputs, 0.1))
    # float32 here and float64 there: a value at the middle of two levels may go either way.
    assert (done.weight.codes != expected).mean() < 0.01
    plain = gptq(weight, inputs, spec, GptqOptions(act_order=False), grid)
    assert (plain.weight.codes != expected).mean() > 0.05


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_diagonal_curvature_changes_nothing(spec: QuantSpec) -> None:
    weight, inputs = normal(40, 64), moments(64, 1)
    plain = gptq(weight, inputs, spec)
    diagonals = torch.rand(2, 20, generator=torch.Generator().manual_seed(4)) + 0.1
    weighed = gptq(weight, inputs, spec, outputs=[output_factor(torch.diag(each), TOKENS) for each in diagonals])
    assert np.array_equal(plain.weight.codes, weighed.weight.codes)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_coupled_outputs_lose_less(spec: QuantSpec) -> None:
    weight, inputs, outputs = normal(48, 64), moments(64, 1), moments(48, 2)
    grid = searched_grid(weight, spec, inputs.diagonal())

    def loss(curvature: list[torch.Tensor]) -> float:
        done = gptq(weight, inputs, spec, None, grid, [output_factor(each, TOKENS).half() for each in curvature])
        error = torch.from_numpy(done.weight.dequantize()).double() - weight.double()
        return float(torch.trace(outputs.double() @ error @ inputs.double() @ error.T))

    assert loss([outputs]) < 0.7 * loss([])
    # Half of the couplings are of use, too.
    assert loss([outputs[:24, :24], outputs[24:, 24:]]) < 0.95 * loss([])


@pytest.mark.parametrize("broken", [torch.zeros(5, 5), torch.full((5, 5), float("nan"))])
def test_a_group_without_curvature_is_rounded_row_by_row(broken: torch.Tensor) -> None:
    spec = QuantSpec(4, PerChannel())
    weight, inputs, outputs = normal(12, 32), moments(32, 1), moments(7, 2)
    done = gptq(
        weight, inputs, spec, None, None, [output_factor(broken, TOKENS), output_factor(outputs, TOKENS)]
    ).weight.codes
    assert np.array_equal(done[:5], gptq(weight, inputs, spec).weight.codes[:5])
    assert not np.array_equal(done[5:], gptq(weight, inputs, spec).weight.codes[5:])


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_alone_are_rounded_to_nearest_bit_by_bit(spec: QuantSpec) -> None:
    grid = searched_grid(normal(33, 16), spec)
    values = normal(33, 1, seed=8)[:, 0] * 3
    steps, zeros = grid.steps[:, 0], grid.zero_points[:, 0]
    found = NearestPlane([torch.eye(20), torch.eye(13)]).codes(values, steps, zeros, spec)
    assert torch.equal(found, plain_codes(values, steps, zeros, spec))
