"""The Hadamard transform: orthogonal, its own inverse, and independent of the order of its sums."""

from __future__ import annotations

import numpy as np
import pytest

from bdq_runtime.reference import hadamard
from bdq_runtime.reference.hadamard import grid_bits, interleaved, sylvester

SIZES = [1 << i for i in range(13)]


@pytest.mark.parametrize("size", SIZES)
def test_it_is_the_orthogonal_transform(size: int) -> None:
    x = np.random.default_rng(size).standard_normal((2, 4096)).astype(np.float32)
    exact = (x.astype(np.float64).reshape(2, -1, size) @ sylvester(size).astype(np.float64)).reshape(x.shape)
    error = np.abs(hadamard(x, size) - exact / np.sqrt(size)).max()
    assert error <= np.abs(x).max() * 2.0 ** -grid_bits(size) * np.sqrt(size)
    assert np.abs(hadamard(hadamard(x, size), size) - x).max() <= 2 * np.abs(x).max() * 2.0**-12 * 64 / np.sqrt(
        4096 / size
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_partial_sum_is_an_exact_float(size: int) -> None:
    assert 2.0 ** grid_bits(size) * size <= 2.0**24
    x = np.full((1, size), 3.1e7, np.float32)  # the largest sum that there is
    shuffled = np.random.default_rng(0).permutation(size)
    step = np.float32(3.1e7) * np.float32(2.0 ** -grid_bits(size))
    grid = np.rint(x * (np.float32(1) / step))
    sums = [np.add.accumulate(grid[0][order], dtype=np.float32)[-1] for order in (np.arange(size), shuffled)]
    assert sums[0] == sums[1] == hadamard(x, size)[0, 0] / (step * np.float32(1 / np.sqrt(size)))


def test_rows_of_zeros_and_huge_rows_stay_finite() -> None:
    x = np.array([[0.0] * 64, [1e36] * 64, [1e-37] * 64], np.float32)
    y = hadamard(x, 64)
    assert np.isfinite(y).all()
    assert not y[0].any()


@pytest.mark.parametrize(("k", "runs"), [(1, 1), (24, 1), (24, 3), (24, 8), (24, 24), (576, 9)])
def test_channels_of_runs_take_turns(k: int, runs: int) -> None:
    x = np.random.default_rng(k).standard_normal((2, 3, k)).astype(np.float32)
    turned, length = interleaved(x, runs), k // runs
    for i in range(runs):
        for j in range(length):
            np.testing.assert_array_equal(turned[..., j * runs + i], x[..., i * length + j])
    size = k & -k
    np.testing.assert_array_equal(hadamard(x, size, runs), hadamard(turned, size))


def test_sizes_that_are_no_transform_are_refused() -> None:
    with pytest.raises(ValueError, match="size is 12"):
        hadamard(np.ones((1, 24), np.float32), 12)
    with pytest.raises(ValueError, match="24 channels"):
        hadamard(np.ones((1, 24), np.float32), 16)
    for runs in (0, -1, 5, 48):
        with pytest.raises(ValueError, match=f"24 channels in {runs} runs"):
            hadamard(np.ones((1, 24), np.float32), 8, runs)
