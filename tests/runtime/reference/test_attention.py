"""Attention: what is in the cache, who sees whom, and that one prompt is the same in one call or in many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bdq_runtime.reference import dequantize_cache_rows, hadamard, kv_attention, quantize_cache_rows, rotate_halves
from bdq_runtime.reference.cache_rows import row_bytes

HEADS, KV_HEADS, D = 4, 2, 16
ANGLES = np.arange(32)[:, None] * 10000.0 ** -(np.arange(6) / 6)  # rotary_dim 12 of 16
COS, SIN = np.cos(ANGLES).astype(np.float32), np.sin(ANGLES).astype(np.float32)
PLAIN = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "head_size": D, "key_bits": 4, "value_bits": 3, "scale": 0.25}


def _qkv(batch: int, tokens: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((batch, tokens, heads * D)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)]


def _past(batch: int, positions: int, fill: int = 0) -> list[np.ndarray]:
    return [np.full((batch, KV_HEADS, positions, row_bytes(D, bits)), fill, np.uint8) for bits in (4, 3)]


def _lengths(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32) - 1


@pytest.mark.parametrize("extra", [{}, {"hadamard": 1}, {"softcap": 5.0}, {"local_window_size": 3}, {"key_clip": 0.8}])
def test_it_is_attention_over_what_the_cache_holds(extra: dict[str, Any]) -> None:
    query, key, value = _qkv(1, 7)
    found = kv_attention(query, key, value, *_past(1, 0), _lengths(7), 7, COS, SIN, **PLAIN, **extra)
    for head in range(HEADS):
        q, k = (x[0].reshape(7, -1, D)[:, h] for x, h in ((query, head), (key, head // 2)))
        q, k = rotate_halves(q, COS[:7], SIN[:7]), rotate_halves(k, COS[:7], SIN[:7])
        if extra.get("hadamard"):
            q, k = hadamard(q, D), hadamard(k, D)
        row = quantize_cache_rows(k, 4, extra.get("key_clip", 1.0))
        assert np.array_equal(found.present_key[0, head // 2], row)
        k = dequantize_cache_rows(row, D, 4)
        v = dequantize_cache_rows(quantize_cache_rows(value[0].reshape(7, -1, D)[:, head // 2], 3), D, 3)
        for i in range(7):
            first = max(0, i + 1 - extra["local_window_size"]) if "local_window_size" in extra else 0
            z = np.float64(0.25) * (k[first : i + 1].astype(np.float64) @ q[i])
            if "softcap" in extra:
                z = 5 * np.tanh(z / 5)
            weights = np.exp(z) / np.exp(z).sum()
            expected = weights @ v[first : i + 1].astype(np.float64)
            np.testing.assert_allclose(found.output[0, i, head * D : (head + 1) * D], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("buffer", [0, 20])
def test_a_prompt_in_pieces_is_the_prompt(buffer: int) -> None:
    query, key, value = _qkv(2, 9)
    whole = kv_attention(query, key, value, *_past(2, 0), _lengths(9, 9), 9, COS, SIN, **PLAIN)
    past, outputs = _past(2, buffer), []
    for start, end in ((0, 4), (4, 5), (5, 6), (6, 9)):
        parts = [x[:, start:end] for x in (query, key, value)]
        found = kv_attention(*parts, *past, _lengths(end, end), end, COS, SIN, **PLAIN)
        past = [found.present_key, found.present_value]
        outputs.append(found.output)
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), whole.output, rtol=1e-6, atol=1e-7)
    assert past[0].shape[2] == max(buffer, 9)
    assert np.array_equal(past[0][:, :, :9], whole.present_key)
    assert np.array_equal(past[1][:, :, :9], whole.present_value)


def test_rows_of_a_right_padded_batch_are_the_rows_alone() -> None:
    query, key, value = _qkv(2, 6)
    lengths = (4, 6)
    prompt = kv_attention(query, key, value, *_past(2, 0), _lengths(*lengths), 6, COS, SIN, **PLAIN)
    step = _qkv(2, 1, seed=1)
    past = [prompt.present_key, prompt.present_value]
    both = kv_attention(*step, *past, _lengths(5, 7), 7, COS, SIN, **PLAIN)
    for b, length in enumerate(lengths):
        alone = [x[b : b + 1, :length] for x in (query, key, value)]
        first = kv_attention(*alone, *_past(1, 0), _lengths(length), length, COS, SIN, **PLAIN)
        np.testing.assert_allclose(prompt.output[b, :length], first.output[0], rtol=1e-6, atol=1e-7)
        one = [x[b : b + 1] for x in step]
        cache = [first.present_key, first.present_value]
        second = kv_attention(*one, *cache, _lengths(length + 1), length + 1, COS, SIN, **PLAIN)
        np.testing.assert_allclose(both.output[b], second.output[0], rtol=1e-6, atol=1e-7)
        assert np.array_equal(both.present_key[b, :, : length + 1], second.present_key[0])


def test_positions_without_a_token_keep_what_the_buffer_has() -> None:
    found = kv_attention(*_qkv(1, 2), *_past(1, 8, fill=7), _lengths(5), 5, COS, SIN, **PLAIN)
    assert (found.present_key[:, :, [0, 1, 2, 5, 6, 7]] == 7).all()
    assert not (found.present_key[:, :, 3:5] == 7).all()


@pytest.mark.parametrize(
    ("lengths", "tokens", "total", "message"),
    [((3,), 2, 2, "expected 0 to total_sequence_length - 1 = 1"), ((1,), 2, 5, "expected at least 1 for 2 tokens")],
)
def test_lengths_that_contradict_are_refused(lengths: tuple[int, ...], tokens: int, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kv_attention(*_qkv(1, tokens), *_past(1, 0), _lengths(*lengths), total, COS, SIN, **PLAIN)
