"""Hadamard and quantization of rows on the GPU: the bits of the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bdq_runtime.panels import CHUNK
from bdq_runtime.reference import dynamic_fake_quantize, hadamard, quantize_activations
from bdq_runtime.reference.hadamard import grid_bits

Array = npt.NDArray[Any]


def _rows(m: int, k: int, seed: int = 0) -> Array:
    random = np.random.default_rng(seed)
    x = random.standard_normal((m, k)) * np.exp(random.standard_normal((m, 1)) * 4)
    x[:, random.integers(k)] *= 30.0
    return x.astype(np.float32)


def _factor(bits: int, clip: float) -> float:
    return float(np.float32(clip) / np.float32(2 ** (bits - 1) - 1))


def _hadamard_arguments(size: int) -> tuple[int, float, float]:
    return size.bit_length() - 1, 2.0 ** -grid_bits(size), float(np.float32(1 / np.sqrt(np.float64(size))))


def _in_groups(codes: Array, fields: int) -> Array:
    """Columns of each group of 4 * fields as `quantize_rows` stores them."""
    m, padded = codes.shape
    return np.ascontiguousarray(codes.reshape(m, -1, fields, 4).swapaxes(2, 3)).reshape(m, padded)


@pytest.mark.parametrize("k", [64, 96, 576, 1600])
@pytest.mark.parametrize(("bits", "clip", "fields"), [(3, 1.0, 1), (4, 0.83, 2), (8, 0.7, 8), (4, 1.0, 4)])
def test_codes_scales_and_sums_are_those_of_the_reference(
    launch: Callable[..., None], k: int, bits: int, clip: float, fields: int
) -> None:
    x = _rows(3, k)
    x[1] = 0
    padded = -(-k // CHUNK) * CHUNK
    q = np.full((3, padded), 77, np.int8)
    scale, total = np.zeros(3, np.float32), np.zeros(3, np.int32)
    sums = np.zeros((3, padded // 32), np.int32)
    high = float(2 ** (bits - 1) - 1)
    launch(
        "rows.quantize_rows",
        (3,),
        *(x, q, scale, total, sums, k, padded, _factor(bits, clip), high, fields.bit_length() - 1, 1),
        BLOCK=1024,
    )
    codes, expected = quantize_activations(x, bits, clip)
    codes = np.pad(codes, ((0, 0), (0, padded - k)))
    np.testing.assert_array_equal(q, _in_groups(codes, fields))
    np.testing.assert_array_equal(scale, expected[:, 0])
    np.testing.assert_array_equal(total, codes.sum(1, dtype=np.int32))
    np.testing.assert_array_equal(sums, codes.reshape(3, -1, 32).sum(2, dtype=np.int32))


@pytest.mark.parametrize(("k", "size", "block"), [(96, 32, 1024), (576, 64, 1024), (1536, 512, 1024), (96, 1, 1024)])
def test_hadamard_has_the_bits_of_the_reference(launch: Callable[..., None], k: int, size: int, block: int) -> None:
    x = _rows(2, k)
    diagonal = np.exp(np.random.default_rng(1).standard_normal(k)).astype(np.float32)
    for has_diagonal in (0, 1):
        y = np.full_like(x, np.nan)
        launch("rows.hadamard_rows", (2,), x, diagonal, y, k, 1, *_hadamard_arguments(size), has_diagonal, BLOCK=block)
        expected = hadamard(x, size) * diagonal if has_diagonal else hadamard(x, size)
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("k", "size", "runs"), [(96, 32, 3), (576, 64, 9), (96, 8, 96), (1536, 512, 6), (2304, 256, 18)]
)
def test_channels_of_runs_take_turns(launch: Callable[..., None], k: int, size: int, runs: int) -> None:
    x = _rows(2, k)
    y = np.full_like(x, np.nan)
    launch("rows.hadamard_rows", (2,), x, x, y, k, runs, *_hadamard_arguments(size), 0, BLOCK=1024)
    np.testing.assert_array_equal(y, hadamard(x, size, runs))


def test_large_hadamard_has_the_bits_of_the_reference(launch: Callable[..., None]) -> None:
    x = _rows(1, 8192)
    y = np.full_like(x, np.nan)
    launch("rows.hadamard_rows", (1,), x, x, y, 8192, 1, *_hadamard_arguments(4096), 0, BLOCK=4096)
    np.testing.assert_array_equal(y, hadamard(x, 4096))


@pytest.mark.parametrize("runs", [1, 3])
def test_rotated_rows_are_quantized_as_the_reference_does(launch: Callable[..., None], runs: int) -> None:
    k, size, padded = 96, 32, 128
    x = _rows(2, k)
    diagonal = np.linspace(0.5, 2, k, dtype=np.float32)
    y, q = np.zeros_like(x), np.zeros((2, padded), np.int8)
    scale, total, sums = np.zeros(2, np.float32), np.zeros(2, np.int32), np.zeros((2, 4), np.int32)
    launch(
        "rows.rotate_quantize_rows",
        (2,),
        *(x, diagonal, y, q, scale, total, sums, k, padded, runs, *_hadamard_arguments(size)),
        *(_factor(4, 0.9), 7.0, 1, 0),
        BLOCK=1024,
    )
    codes, expected = quantize_activations(hadamard(x, size, runs) * diagonal, 4, 0.9)
    np.testing.assert_array_equal(q, _in_groups(np.pad(codes, ((0, 0), (0, padded - k))), 2))
    np.testing.assert_array_equal(scale, expected[:, 0])


@pytest.mark.parametrize(("bits", "clip"), [(3, 1.0), (4, 0.8), (8, 0.6)])
def test_fake_quantization_has_the_bits_of_the_reference(launch: Callable[..., None], bits: int, clip: float) -> None:
    x = _rows(3, 700)
    y = np.full_like(x, np.nan)
    launch("rows.fake_quantize_rows", (3,), x, y, 700, _factor(bits, clip), float(2 ** (bits - 1) - 1), BLOCK=1024)
    np.testing.assert_array_equal(y, dynamic_fake_quantize(x, bits, clip))
