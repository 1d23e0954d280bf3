"""Rotations are orthogonal, spread a spike, and depend on size and seed only."""

from __future__ import annotations

import pytest
import torch

from bdq_export.transform.hadamard import hadamard, random_hadamard


@pytest.mark.parametrize("size", [1, 2, 3, 20, 64, 96, 576, 1536])
def test_orthogonal(size):
    rotation = random_hadamard(size, seed=1)
    assert rotation.dtype == torch.float64
    assert (rotation.T @ rotation - torch.eye(size)).abs().amax().item() < 1e-12


@pytest.mark.parametrize("size", [20, 64, 576])
def test_seeded(size):
    assert torch.equal(random_hadamard(size, seed=5), random_hadamard(size, seed=5))
    assert not torch.equal(random_hadamard(size, seed=5), random_hadamard(size, seed=6))


@pytest.mark.parametrize("size", [64, 576, 1536])
def test_a_spike_is_spread(size):
    """A power of two spreads it evenly; an odd part q leaves at most one block of size/q."""
    largest = random_hadamard(size, seed=0).abs().amax().item()
    power = size & -size
    assert largest <= power**-0.5 + 1e-12
    if power == size:
        assert largest == pytest.approx(size**-0.5)


def test_sylvester():
    expected = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).double() / 2
    assert torch.equal(hadamard(4), expected)


def test_bad_sizes():
    with pytest.raises(ValueError, match="size 0"):
        random_hadamard(0, seed=0)
    with pytest.raises(ValueError, match="size 12 was asked for, expected a power of two"):
        hadamard(12)
