"""Flatness is a KL divergence from the uniform distribution: its bounds, its invariances, its order."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bdq_export.transform import flatness, random_hadamard


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000))
def test_between_flat_and_one_spike(rows, columns, seed):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    assert 0 <= flatness(matrix) <= math.log(rows * columns) + 1e-12


def test_constant_is_zero_and_a_spike_is_the_maximum():
    assert flatness(torch.full((7, 9), -3.0)) == pytest.approx(0, abs=1e-12)
    spike = torch.zeros(7, 9)
    spike[3, 4] = 0.1
    assert flatness(spike) == pytest.approx(math.log(63))


def test_known_value():
    """p = (0.8, 0.2): 0.8 ln 0.8 + 0.2 ln 0.2 + ln 2."""
    expected = 0.8 * math.log(0.8) + 0.2 * math.log(0.2) + math.log(2)
    assert flatness(torch.tensor([[2.0, -1.0]])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("factor", [1e-200, 1e-3, -5.0, 1e200])
def test_scale_invariant(factor):
    matrix = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).double()
    assert flatness(matrix * factor) == pytest.approx(flatness(matrix), rel=1e-9)


def test_rotation_lowers_an_outlier_channel():
    matrix = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)).double()
    matrix[:, 5] *= 50
    assert flatness(matrix @ random_hadamard(64, seed=0)) < 0.5 * flatness(matrix)


def test_large_matrices_go_in_slabs(monkeypatch):
    matrix = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    whole = flatness(matrix)
    monkeypatch.setattr(sys.modules[flatness.__module__], "SLAB", 7)
    assert flatness(matrix) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_undefined(value):
    matrix = torch.zeros(3, 3)
    matrix[1, 1] = value
    with pytest.raises(ValueError, match="expected finite, not all 0"):
        flatness(matrix)
    with pytest.raises(ValueError, match="0 entries"):
        flatness(torch.zeros(0, 3))
