"""GroupQueryAttention over its own integer cache computes what plain arithmetic says, in every form it is used in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from attention_model import HEADS, KV_HEADS, SIZE, attention_model

from bdq_passes import StoreKVCacheAsIntegersPass
from bdq_runtime.session import numpy_type
from bdq_runtime.specs import StaticKVQuantization

PROMPT, BUFFER = 70, 128
SCALES = np.random.default_rng(0).uniform(0.5, 1.5, (2, KV_HEADS, SIZE)).astype(np.float32)


def _cache(bits: int) -> StaticKVQuantization:
    """Scales that clip a few of the values of a standard normal distribution."""
    return StaticKVQuantization(bits, *(SCALES * np.float32(3 / (1 << (bits - 1)))))


def _session(model: ir.Model) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _rotated(x: Any, tables: dict[str, Any], start: int) -> Any:
    """RoPE of heads `[heads, tokens, SIZE]` that begin at position `start`; without tables, `x`."""
    if not tables:
        return x
    cos, sin = (tables[name][start : start + x.shape[1]] for name in ("cos", "sin"))
    low, high = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def _codes(x: Any, scales: Any, bits: int) -> Any:
    half = 1 << (bits - 1)
    return np.clip(np.rint(x * (np.float32(1) / scales[:, None])), -half, half - 1)


def _attention(query: Any, key: Any, value: Any, past: int, window: int, softcap: float) -> Any:
    """`[tokens, HEADS * SIZE]` in float64, of heads of all tokens so far."""
    key, value = (np.repeat(each.astype(np.float64), HEADS // KV_HEADS, axis=0) for each in (key, value))
    scores = np.einsum("hsd,htd->hst", query.astype(np.float64), key) * 0.3
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    rows, columns = np.arange(query.shape[1])[:, None] + past, np.arange(key.shape[1])
    seen = (columns <= rows) & (columns > rows - (window if window > 0 else BUFFER))
    weights = np.exp(np.where(seen, scores, -np.inf))
    return np.einsum("hst,htd->shd", weights / weights.sum(-1, keepdims=True), value).reshape(query.shape[1], -1)


def _unpacked(cache: Any, bits: int) -> Any:
    """Integers of the cache, `[KV_HEADS, positions, SIZE]`."""
    if bits == 8:
        return cache[0].astype(int)
    return np.stack([cache[0] & 15, cache[0] >> 4], axis=-1).reshape(KV_HEADS, -1, SIZE).astype(int) - 8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("extra", [{}, {"local_window_size": 16}, {"softcap": 4.0}])
def test_a_long_prompt_and_its_continuation(
    bits: int, packed: bool, rotary: bool, shared: bool, extra: dict[str, Any]
) -> None:
    model, cache = attention_model(packed, rotary, **extra), _cache(bits)
    StoreKVCacheAsIntegersPass({3: cache})(model)
    session = _session(model)
    angles = np.arange(BUFFER)[:, None] * 0.5 ** np.arange(SIZE // 2)
    tables = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)} if rotary else {}
    names = ("past_key_values.3.key", "past_key_values.3.value")
    types = {value.name: numpy_type(value.type) for value in session.get_inputs()}
    channels = SIZE if bits == 8 else SIZE // 2
    assert [types[name] for name in names] == [np.dtype(np.int8 if bits == 8 else np.uint8)] * 2
    pasts = [np.zeros((1, KV_HEADS, BUFFER if shared else 0, channels), types[name]) for name in names]
    keys, values = (np.zeros((KV_HEADS, 0, SIZE), np.float32) for _ in range(2))
    done, wrong, random = 0, 0, np.random.default_rng(1)
    for count in (PROMPT, 1, 5, 1):
        q, k, v = (
            random.standard_normal((heads, count, SIZE)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        rows = [each.transpose(1, 0, 2).reshape(1, count, -1) for each in (q, k, v)]
        total = done + count
        feeds = {
            **({"qkv": np.concatenate(rows, -1)} if packed else dict(zip("qkv", rows, strict=True))),
            **dict(zip(names, pasts, strict=True)),
            "lengths": np.array([total - 1], np.int32),
            "total": np.array(total, np.int32),
            **tables,
        }
        found, *pasts = session.run(None, feeds)
        assert all(past.shape[2] == (BUFFER if shared else total) for past in pasts)
        q, k = _rotated(q, tables, done), _rotated(k, tables, done)
        written = [_codes(k, cache.key_scales, bits), _codes(v, cache.value_scales, bits)]
        for past, codes in zip(pasts, written, strict=True):
            wrong += int((_unpacked(past, bits)[:, done:total] != codes).sum())
        keys, values = (
            np.concatenate([before, codes * scales[:, None]], axis=1)
            for before, codes, scales in zip(
                (keys, values), written, (cache.key_scales, cache.value_scales), strict=True
            )
        )
        expected = _attention(q, keys, values, done, extra.get("local_window_size", 0), extra.get("softcap", 0.0))
        np.testing.assert_allclose(found[0], expected, rtol=0, atol=2e-3 if wrong else 1e-5)
        done = total
    assert wrong <= 2, "a product of RoPE that another rounding puts on the other side of a step, and no more"


def test_the_lower_half_of_a_byte_is_the_lower_channel() -> None:
    model, cache = attention_model(rotary=False), StaticKVQuantization(4, *np.ones((2, KV_HEADS, SIZE), np.float32))
    StoreKVCacheAsIntegersPass({3: cache})(model)
    qkv = np.zeros((1, 1, (HEADS + 2 * KV_HEADS) * SIZE), np.float32)
    qkv[0, 0, HEADS * SIZE : HEADS * SIZE + 4] = [-8, 7, 2.5, -100]
    past = np.zeros((1, KV_HEADS, 0, SIZE // 2), np.uint8)
    lengths = {"lengths": np.array([0], np.int32), "total": np.array(1, np.int32)}
    feeds = {"qkv": qkv, "past_key_values.3.key": past, "past_key_values.3.value": past, **lengths}
    _, key, _ = _session(model).run(None, feeds)
    assert key[0, 0, 0, :3].tolist() == [0xF0, 0x0A, 0x88]


@pytest.mark.parametrize(
    ("layer", "cache", "message"),
    [
        (4, _cache(8), "1 layers to get a quantized cache have no GroupQueryAttention, the first is 4"),
        (3, replace(_cache(8), bits=3), r"a cache of 3 bits, GroupQueryAttention has \[4, 8\]"),
        (3, replace(_cache(8), key_scales=SCALES[0].astype(np.float64)), "key scales are float64"),
        (3, replace(_cache(8), value_scales=SCALES[0, :, 1:]), r"value scales are float32 \[2, 15\]"),
        (3, replace(_cache(8), value_scales=SCALES[0] * 0), "expected positive"),
    ],
)
def test_what_the_operator_does_not_have_is_an_error(layer: int, cache: StaticKVQuantization, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StoreKVCacheAsIntegersPass({layer: cache})(attention_model())


def test_a_second_run_is_an_error() -> None:
    model = attention_model()
    StoreKVCacheAsIntegersPass({3: _cache(8)})(model)
    with pytest.raises(ValueError, match="has scales already"):
        StoreKVCacheAsIntegersPass({3: _cache(8)})(model)
