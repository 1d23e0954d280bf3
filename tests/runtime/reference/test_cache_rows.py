"""Rows of the cache: the scale's code, the place of each code, and how far a value may be from what it stood for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdq_runtime.reference import dequantize_cache_rows, quantize_cache_rows
from bdq_runtime.reference.cache_rows import decode_scale, encode_scale, quantize_row_codes, row_bytes

KV_BITS = st.sampled_from([3, 4, 8])


def test_every_code_of_a_scale_survives_and_is_monotone() -> None:
    codes = np.arange(65536, dtype=np.uint32)
    scales = decode_scale(codes)
    by_formula = (1024 + codes % 1024) * 2.0 ** (codes // 1024 - 42.0)
    assert np.array_equal(scales.astype(np.float64), by_formula)
    assert (np.diff(scales) > 0).all()
    assert np.array_equal(encode_scale(scales), codes)


@given(st.floats(2.0**-32, 2.0**127, width=32))
def test_a_scale_is_the_nearest_of_its_grid(r: float) -> None:
    scale = float(decode_scale(encode_scale(np.float32(r)[None]))[0])
    largest = 2047 * 2.0**21
    assert abs(scale - r) <= r * 2.0**-11 or (r > largest and scale == largest)


@given(st.lists(st.floats(2.0**-32, 2.0**127, width=32), min_size=2, max_size=20))
def test_encoding_is_monotone(values: list[float]) -> None:
    codes = encode_scale(np.sort(np.array(values, np.float32)))
    assert (np.diff(codes.astype(np.int64)) >= 0).all()


@given(KV_BITS, st.integers(1, 20), st.integers(0, 2**31), st.floats(-9, 9), st.floats(-3, 3))
def test_a_value_comes_back_within_half_a_step(
    bits: int, eighths: int, seed: int, exponent: float, mean: float
) -> None:
    size = 8 * eighths
    x = ((np.random.default_rng(seed).standard_normal((2, 3, size)) + mean) * 10.0**exponent).astype(np.float32)
    rows = quantize_cache_rows(x, bits)
    assert rows.shape == (2, 3, row_bytes(size, bits))
    _, scale, _ = quantize_row_codes(x, bits)
    step = decode_scale(scale)[..., None]
    error = np.abs(dequantize_cache_rows(rows, size, bits) - x)
    # z is rounded and the step may be rounded down, so that both ends of the range lose up to half a step more
    assert (error <= 1.2 * step).all()
    inside = (x > x.min(-1, keepdims=True) + step) & (x < x.max(-1, keepdims=True) - step)
    assert (error <= 0.51 * step)[inside].all()


@given(KV_BITS, st.integers(1, 20), st.data())
def test_each_code_has_the_place_that_the_page_says(bits: int, eighths: int, data: st.DataObject) -> None:
    size = 8 * eighths
    channel = data.draw(st.integers(0, size - 1))
    x = np.zeros((1, size), np.float32)
    x[0, channel] = 1
    codes, scale, zero = quantize_row_codes(x, bits)
    row = quantize_cache_rows(x, bits)[0]
    expected = np.zeros_like(row)
    start, value = 0, int(codes[0, channel])
    for p in {3: (2, 1), 4: (4,), 8: (8,)}[bits]:
        t, i = divmod(channel, size * p // 8)
        expected[start + i] = (value & ((1 << p) - 1)) << (p * t)
        start += size * p // 8
        value >>= p
    expected[start:] = [scale[0] & 255, scale[0] >> 8, (zero[0] + 32768) & 255, (zero[0] + 32768) >> 8]
    assert np.array_equal(row, expected)


def test_rows_that_hold_one_value_keep_it() -> None:
    for value in (0.0, 5.0, -3e-5, 1e9):
        x = np.full((1, 8), value, np.float32)
        assert abs(dequantize_cache_rows(quantize_cache_rows(x, 4), 8, 4)[0, 0] - value) <= abs(value) * 2.0**-13


def test_a_clip_narrows_the_range() -> None:
    x = np.linspace(-1, 1, 16, dtype=np.float32)[None]
    wide, narrow = (decode_scale(quantize_row_codes(x, 4, clip)[1])[0] for clip in (1.0, 0.5))
    assert abs(narrow / wide - 0.5) < 2e-3


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 10 bytes, expected 36"):
        dequantize_cache_rows(np.zeros((1, 10), np.uint8), 64, 4)
    with pytest.raises(ValueError, match="head size 60"):
        quantize_cache_rows(np.zeros((1, 60), np.float32), 4)
