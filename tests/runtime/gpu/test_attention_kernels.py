"""Attention kernels on the GPU against the NumPy reference: the bytes of the cache, attention to rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bdq_runtime.reference import AttentionOutputs, kv_attention
from bdq_runtime.reference.cache_rows import quantize_cache_rows
from bdq_runtime.reference.hadamard import grid_bits

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One call of an attention operator; `lengths` are the tokens of each row, those of this call among them."""

    tokens: int
    lengths: tuple[int, ...]
    total: int
    buffer: int
    heads: int = 6
    kv_heads: int = 2
    size: int = 16
    key_bits: int = 4
    value_bits: int = 4
    rotary: int = 0
    hadamard: int = 0
    softcap: float = 0.0
    window: int = -1
    parts: int = 1


CASES = [
    Case(5, (5,), 5, 0),
    Case(1, (8,), 8, 7, rotary=16, hadamard=1, parts=3),
    Case(1, (8, 3), 8, 12, key_bits=3, value_bits=8, size=24, rotary=8),
    Case(3, (9, 4), 9, 9, key_bits=8, value_bits=3, size=40, heads=2, kv_heads=2, window=3),
    Case(7, (7, 2), 7, 0, rotary=32, size=32, hadamard=1, softcap=3.0, window=4, parts=2),
]


@dataclass(frozen=True)
class Data:
    """Inputs of a case and what the reference makes of them."""

    query: Array
    key: Array
    value: Array
    past_key: Array
    past_value: Array
    seqlens: Array
    cos: Array
    sin: Array
    expected: AttentionOutputs


def _data(case: Case) -> Data:
    random = np.random.default_rng(5)
    batch = len(case.lengths)
    query, key, value = (
        random.standard_normal((batch, case.tokens, h * case.size)).astype(np.float32)
        for h in (case.heads, case.kv_heads, case.kv_heads)
    )
    key += 0.7
    pasts = [
        quantize_cache_rows(
            random.standard_normal((batch, case.kv_heads, case.buffer + 1, case.size)).astype(np.float32), bits
        )[:, :, 1:].copy()
        for bits in (case.key_bits, case.value_bits)
    ]
    angles = np.outer(np.arange(32), 10.0 ** -np.linspace(0, 2, max(case.rotary // 2, 1)))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    seqlens = np.array(case.lengths, np.int32) - 1
    tables = (cos, sin) if case.rotary else (None, None)
    expected = kv_attention(
        query, key, value, *pasts, seqlens, case.total, *tables,
        num_heads=case.heads, kv_num_heads=case.kv_heads, head_size=case.size,
        key_bits=case.key_bits, value_bits=case.value_bits, scale=0.3, key_clip=0.95, value_clip=0.9,
        hadamard=case.hadamard, softcap=case.softcap, local_window_size=case.window,
    )  # fmt: skip
    return Data(query, key, value, *pasts, seqlens, cos, sin, expected)


def _append(launch: Callable[..., None], case: Case, data: Data) -> tuple[tuple[Array, ...], Array, Array]:
    """Queries in two halves with their factors, and the two presents."""
    batch, positions = len(case.lengths), max(case.buffer, case.total)
    presents = []
    for past in (data.past_key, data.past_value):
        row = past.shape[-1]
        present = np.full((batch, case.kv_heads, positions, row), 99, np.uint8)
        grid = (-(-positions * row // 256), batch * case.kv_heads)
        launch("cache.move_cache", grid, past, present, case.buffer * row, positions * row, BLOCK=256, WORDS=False)
        presents.append(present)
    shape = (batch, case.tokens, case.heads)
    high, low = (np.full((*shape, case.size), np.nan, np.float16) for _ in range(2))
    queries = (high, low, np.full((*shape, 2), np.nan, np.float32))
    launch(
        "cache.attention_rows",
        (case.tokens, case.heads + 2 * case.kv_heads, batch),
        *(data.query, data.key, data.value, data.seqlens, data.cos, data.sin, *queries, *presents),
        *(case.heads * case.size, case.kv_heads * case.size, case.kv_heads * case.size),
        *(case.tokens, case.total, positions, case.heads, case.kv_heads, case.size, case.rotary // 2),
        *(case.size.bit_length() - 1 if case.hadamard else 0, 2.0 ** -grid_bits(case.size)),
        *(float(np.float32(case.size**-0.5)), case.key_bits, case.value_bits),
        *(float(np.float32(0.95)), float(np.float32(0.9)), float(np.float32(0.3))),
        BD=64,
    )
    return queries, presents[0], presents[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_appended_rows_have_the_bytes_of_the_reference(launch: Callable[..., None], case: Case) -> None:
    data = _data(case)
    _, key, value = _append(launch, case, data)
    np.testing.assert_array_equal(key, data.expected.present_key)
    np.testing.assert_array_equal(value, data.expected.present_value)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_agrees_to_rounding(launch: Callable[..., None], case: Case) -> None:
    data = _data(case)
    queries, key, value = _append(launch, case, data)
    batch, positions, group = len(case.lengths), max(case.buffer, case.total), case.heads // case.kv_heads
    output = np.full((batch, case.tokens, case.heads * case.size), np.nan, np.float32)
    parts = np.zeros((batch, case.tokens, case.heads, case.parts, case.size), np.float32)
    weights = np.zeros((batch, case.tokens, case.heads, case.parts, 2), np.float32)
    launch(
        "attention.cached_attention",
        (-(-case.tokens * group // 16), batch * case.kv_heads, case.parts),
        *(*queries, key, value, data.seqlens, output, parts, weights, case.tokens, case.total, positions),
        *(case.heads, case.kv_heads, case.size, case.key_bits, case.value_bits),
        *(case.softcap, case.window, case.parts),
        **dict(BD=64, BM=16, BN=16, ASM=False),
    )
    if case.parts > 1:
        launch(
            "attention.combine_parts",
            (batch * case.tokens * case.heads,),
            *(parts, weights, output, case.size, case.parts),
            PARTS=32,
        )
    error = np.abs(output - data.expected.output).max()
    assert error < 2e-6, error
    assert np.abs(output * 1.01 - data.expected.output).max() > 2e-6


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_ranges_at_the_ends_of_the_scale_have_the_bytes_of_the_reference(
    launch: Callable[..., None], bits: int
) -> None:
    """Rows of zeros, of one value, of one sign, tiny and huge."""
    random = np.random.default_rng(2)
    x = random.standard_normal((8, 16)).astype(np.float32)
    x[0], x[1], x[2] = 0, 5, np.abs(x[2]) + 100
    x[3:6] *= np.array([1e-12, 1e-38, 1e12], np.float32)[:, None]
    x[6] = np.linspace(-1, 1, 16)
    row = 16 * bits // 8 + 4
    present = np.zeros((1, 1, 8, row), np.uint8)
    seqlens, nothing = np.array([7], np.int32), np.zeros(0, np.float16)
    launch(
        "cache.attention_rows",
        (8, 2, 1),
        *(x, x, x, seqlens, x, x, nothing, nothing, x, present, present, 16, 16, 16, 8, 8, 8, 0, 1, 16, 0, 0, 1.0, 1.0),
        *(bits, bits, 1.0, 1.0, 1.0),
        BD=64,
    )
    np.testing.assert_array_equal(present[0, 0], quantize_cache_rows(x, bits))
