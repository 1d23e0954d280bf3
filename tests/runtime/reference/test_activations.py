"""Activations on their grid: within half a step, symmetric, whatever the scale of a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdq_runtime.reference import dynamic_fake_quantize, quantize_activations


@given(st.sampled_from([3, 4, 8]), st.integers(0, 2**31), st.floats(-30, 30))
def test_codes_are_within_half_a_step(bits: int, seed: int, exponent: float) -> None:
    x = (np.random.default_rng(seed).standard_normal((3, 40)) * 10.0**exponent).astype(np.float32)
    codes, scale = quantize_activations(x, bits)
    assert (np.abs(codes.astype(np.float64) * scale - x) <= 0.5001 * scale).all()
    assert np.abs(codes).max() <= 2 ** (bits - 1) - 1


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_clip_cuts_large_values_to_both_ends(bits: int) -> None:
    x = np.array([[1.0, -1.0, 0.1]], np.float32)
    codes, scale = quantize_activations(x, bits, clip=0.5)
    high = 2 ** (bits - 1) - 1
    assert codes[0, :2].tolist() == [high, -high - 1]
    assert scale[0, 0] == np.float32(0.5) / np.float32(high)


def test_a_row_of_zeros_stays_zero() -> None:
    codes, scale = quantize_activations(np.zeros((2, 8), np.float32), 4)
    assert not codes.any()
    assert (scale == np.float32(1e-30)).all()


def test_rows_do_not_see_each_other() -> None:
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    together = dynamic_fake_quantize(x, 4, 0.9)
    assert np.array_equal(together, np.concatenate([dynamic_fake_quantize(row[None], 4, 0.9) for row in x]))


def test_16_bits_change_nothing_and_other_bits_are_refused() -> None:
    x = np.ones((1, 4), np.float32) / 3
    assert np.array_equal(dynamic_fake_quantize(x, 16), x)
    with pytest.raises(ValueError, match="bits are 5"):
        quantize_activations(x, 5)
