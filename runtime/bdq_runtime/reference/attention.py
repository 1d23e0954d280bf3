"""Attention over a quantized KV cache (docs/ops.md, "Quantized-KV attention")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.reference.cache_rows import dequantize_cache_rows, quantize_cache_rows
from bdq_runtime.reference.hadamard import hadamard as hadamard_transform
from bdq_runtime.reference.rotary import rotate_halves

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class AttentionOutputs:
    """What the attention operators give.

    Attributes:
        output: float32 `[B, S, num_heads * head_size]`.
        present_key: uint8 `[B, kv_num_heads, positions, row]`.
        present_value: the same of values.
    """

    output: Array
    present_key: Array
    present_value: Array


def kv_attention(
    query: Array,
    key: Array,
    value: Array,
    past_key: Array,
    past_value: Array,
    seqlens_k: Array,
    total_sequence_length: int,
    cos_cache: Array | None = None,
    sin_cache: Array | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    head_size: int,
    key_bits: int,
    value_bits: int,
    scale: float,
    key_clip: float = 1.0,
    value_clip: float = 1.0,
    hadamard: int = 0,
    softcap: float = 0.0,
    local_window_size: int = -1,
) -> AttentionOutputs:
    """Attention of `query [B, S, num_heads * head_size]` to the cache, to which `key` and `value` are appended.

    Neither past is changed. `seqlens_k` is int32 `[B]`, the pasts are uint8 `[B, kv_num_heads, positions, row]`.

    Raises:
        ValueError: heads, lengths or shapes that contradict each other.
    """
    if kv_num_heads < 1 or num_heads % kv_num_heads:
        raise ValueError(f"{num_heads} query heads, expected a multiple of the {kv_num_heads} KV heads")
    tokens = query.shape[1]
    pasts = past_lengths(seqlens_k, tokens, total_sequence_length)
    q, k = _heads(query, num_heads, head_size), _heads(key, kv_num_heads, head_size)
    positions = pasts[:, None] + np.arange(tokens)  # [B, S]
    if cos_cache is not None and sin_cache is not None:
        cos, sin = cos_cache[positions][:, None], sin_cache[positions][:, None]
        q, k = rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)
    if hadamard:
        q, k = hadamard_transform(q, head_size), hadamard_transform(k, head_size)
    new_key = quantize_cache_rows(k, key_bits, key_clip)
    new_value = quantize_cache_rows(_heads(value, kv_num_heads, head_size), value_bits, value_clip)
    present_key = append_rows(past_key, new_key, pasts, total_sequence_length)
    present_value = append_rows(past_value, new_value, pasts, total_sequence_length)
    output = _attend(
        q,
        dequantize_cache_rows(present_key[:, :, :total_sequence_length], head_size, key_bits),
        dequantize_cache_rows(present_value[:, :, :total_sequence_length], head_size, value_bits),
        visible_keys(positions, total_sequence_length, local_window_size),
        scale,
        softcap,
    )
    flat = output.transpose(0, 2, 1, 3).reshape(query.shape[0], tokens, num_heads * head_size)
    return AttentionOutputs(flat.astype(np.float32), present_key, present_value)


def split_qkv(qkv: Array, num_heads: int, kv_num_heads: int, head_size: int) -> tuple[Array, Array, Array]:
    """Query, key and value of one `[B, S, (num_heads + 2 kv_num_heads) * head_size]`."""
    first = num_heads * head_size
    query, key, value = np.split(qkv, [first, first + kv_num_heads * head_size], axis=-1)
    return query, key, value


def past_lengths(seqlens_k: Array, tokens: int, total: int) -> Array:
    """Tokens in front of those of this call, for each row: int64 `[B]`; 0 when they are the first prompt."""
    lengths = seqlens_k.astype(np.int64) + 1
    if (lengths < 1).any() or (lengths > total).any():
        raise ValueError(f"seqlens_k is {seqlens_k.tolist()}, expected 0 to total_sequence_length - 1 = {total - 1}")
    if tokens == total:
        return np.zeros_like(lengths)
    if (lengths < tokens).any():
        raise ValueError(f"seqlens_k is {seqlens_k.tolist()}, expected at least {tokens - 1} for {tokens} tokens")
    return lengths - tokens


def append_rows(past: Array, new: Array, pasts: Array, total: int) -> Array:
    """`past` with the rows `new [B, heads, S, row]` from position `pasts[b]` on, longer if `total` is."""
    batch, heads, positions, row = past.shape
    if new.shape[:2] != (batch, heads) or new.shape[3] != row:
        raise ValueError(f"past is {past.shape}, expected {new.shape} with any number of positions")
    present = np.zeros((batch, heads, max(positions, total), row), np.uint8)
    present[:, :, :positions] = past
    for b in range(batch):
        present[b, :, pasts[b] : pasts[b] + new.shape[2]] = new[b]
    return present


def visible_keys(positions: Array, keys: int, window: int) -> Array:
    """Which of `keys` keys the tokens at `positions [B, S]` see: bool `[B, S, keys]`."""
    at = positions[..., None]
    seen: Array = np.arange(keys) <= at
    return seen & (np.arange(keys) > at - window) if window > 0 else seen


def _heads(x: Array, heads: int, head_size: int) -> Array:
    """`[B, S, heads * head_size]` -> float32 `[B, heads, S, head_size]`."""
    if x.shape[-1] != heads * head_size:
        raise ValueError(f"{x.shape[-1]} channels, expected {heads} heads of {head_size}")
    return np.asarray(x, np.float32).reshape(*x.shape[:2], heads, head_size).transpose(0, 2, 1, 3)


def _attend(q: Array, k: Array, v: Array, seen: Array, scale: float, softcap: float) -> Array:
    """float64 `[B, heads, S, D]` of heads in float32; a KV head serves consecutive query heads."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (np.repeat(part.astype(np.float64), groups, axis=1) for part in (k, v))
    scores = np.float64(np.float32(scale)) * (q.astype(np.float64) @ keys.swapaxes(-1, -2))
    if softcap > 0:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = (weights / weights.sum(-1, keepdims=True)) @ values
    return result
