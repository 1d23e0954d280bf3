"""Panels: packing has an inverse for every remainder, and each code is where docs/ops.md says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdq_runtime.panels import (
    interleave_panels,
    pack_panels,
    pack_scales,
    panel_shape,
    unpack_panels,
    unpack_scales,
)

BITS = st.sampled_from([2, 3, 4, 8])


def _codes(seed: int, n: int, k: int, bits: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << bits, (n, k), dtype=np.uint8)


@given(BITS, st.integers(1, 40), st.integers(1, 200), st.integers(0, 2**31))
def test_unpacking_is_the_inverse(bits: int, n: int, k: int, seed: int) -> None:
    codes = _codes(seed, n, k, bits)
    packed = pack_panels(codes, bits)
    assert packed.shape == panel_shape(n, k, bits)
    assert np.array_equal(unpack_panels(packed, bits, n, k), codes)
    full = unpack_panels(packed, bits, 16 * packed.shape[0], 64 * packed.shape[1]) if not (n % 16 or k % 64) else None
    assert full is None or np.array_equal(full, codes)


@given(BITS, st.integers(0, 47), st.integers(0, 191))
def test_each_code_has_the_place_that_the_page_says(bits: int, channel: int, column: int) -> None:
    codes = np.zeros((48, 192), np.uint8)
    codes[channel, column] = (1 << bits) - 1
    chunk = pack_panels(codes, bits)[channel // 16, column // 64]
    expected = np.zeros_like(chunk)
    start = 0
    for p in {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}[bits]:
        fields = 8 // p
        vector, rest = divmod(column % 64, 4 * fields)
        t, j = divmod(rest, 4)
        expected[start + 64 * vector + 4 * (channel % 16) + j] = ((1 << p) - 1) << (p * t)
        start += 128 * p
    assert np.array_equal(chunk, expected)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (15, 63), (16, 64), (17, 65)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_padding_has_code_0(n: int, k: int, bits: int) -> None:
    ones = np.full((n, k), (1 << bits) - 1, np.uint8)
    shape = panel_shape(n, k, bits)
    wide = np.zeros((16 * shape[0], 64 * shape[1]), np.uint8)
    wide[:n, :k] = ones
    assert np.array_equal(pack_panels(ones, bits), pack_panels(wide, bits))


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**31))
def test_scales_have_an_inverse_and_zeros_behind(n: int, blocks: int, seed: int) -> None:
    scales = np.random.default_rng(seed).standard_normal((n, blocks)).astype(np.float16)
    packed = pack_scales(scales)
    assert np.array_equal(unpack_scales(packed, n), scales)
    assert not unpack_scales(packed, 16 * packed.shape[0])[n:].any()


def test_a_gated_weight_takes_panels_in_turn() -> None:
    gate, up = (pack_panels(_codes(seed, 20, 70, 4), 4) for seed in (1, 2))
    both = interleave_panels(gate, up)
    assert both.shape == panel_shape(20, 70, 4, gated=True)
    assert np.array_equal(both[0::2], gate)
    assert np.array_equal(both[1::2], up)


def test_codes_and_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a code is 9"):
        pack_panels(np.full((1, 1), 9, np.uint8), 3)
    with pytest.raises(ValueError, match="weight bits are 5"):
        pack_panels(np.zeros((1, 1), np.uint8), 5)
    with pytest.raises(ValueError, match=r"expected \(2, 1, 512\)"):
        unpack_panels(np.zeros((1, 1, 512), np.uint8), 4, 17, 64)
