"""Attention over the packed cache, in one or several parts of the text (docs/ops.md, "Quantized-KV attention", 4)."""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.cache import past_of
from bdq_runtime.gpu.kernels.names import named

FAR: tl.constexpr = tl.constexpr(-3.0e38)  # a maximum of nothing; finite, so that differences are


@triton.jit
def cache_tile(cache_ptr, j, limit, D, bits, BD: tl.constexpr):
    """Dequantized rows j `[BN]` below `limit` of one head, float32 `[BN, BD]`; 0 elsewhere."""
    d = tl.arange(0, BD)
    inside = (j < limit)[:, None] & (d < D)[None, :]
    row = cache_ptr + j.to(tl.int64) * (D * bits // 8 + 4)
    low_bits = tl.where(bits == 3, 2, bits)
    plane = D * low_bits // 8
    low = tl.load(row[:, None] + (d % plane)[None, :], mask=inside, other=0).to(tl.int32)
    code = (low >> ((d // plane) * low_bits)[None, :]) & ((1 << low_bits) - 1)
    eighth = D // 8
    split = tl.where(bits == 3, D, 0)  # channels with a plane of high bits
    high = tl.load(row[:, None] + (plane + d % eighth)[None, :], mask=inside & (d < split)[None, :], other=0).to(
        tl.int32
    )
    code = code | (((high >> (d // eighth)[None, :]) & 1) << 2)
    ends = row + D * bits // 8
    held = j < limit
    code16 = tl.load(ends, mask=held, other=0).to(tl.int32) | (tl.load(ends + 1, mask=held, other=0).to(tl.int32) << 8)
    zero = tl.load(ends + 2, mask=held, other=0).to(tl.int32) | (
        tl.load(ends + 3, mask=held, other=0).to(tl.int32) << 8
    )
    s = ((code16 << 13) + (95 << 23)).to(tl.float32, bitcast=True)
    return tl.where(inside, (code - (zero - 32768)[:, None]).to(tl.float32) * s[:, None], 0.0)


@triton.jit(repr=named("cached_attention"))
def cached_attention(
    rotated_ptr, key_ptr, value_ptr, seqlens_ptr, output_ptr, parts_ptr, weights_ptr,
    S, total, positions, heads, kv_heads, D, key_bits, value_bits, scale, softcap, window, parts,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Programs (rows of BM, KV head of a batch row, part). A row is a token and a query head of the KV head's group.

    One part: output `[B, S, heads, D]`. Several: each one's average `[.., parts, D]` before division, and its maximum
    and divisor `[.., parts, 2]`, for `combine_parts`.
    """
    group = heads // kv_heads
    b = tl.program_id(1) // kv_heads
    kv_head = tl.program_id(1) % kv_heads
    part = tl.program_id(2)
    past = past_of(seqlens_ptr, b, S, total)
    first = tl.program_id(0) * BM
    r = first + tl.arange(0, BM)
    live = r < S * group
    token = r // group
    head = kv_head * group + r % group
    d = tl.arange(0, BD)
    place = (b * S + token).to(tl.int64) * heads + head
    q = tl.load(rotated_ptr + place[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
    q_position = past + token

    reach = tl.where(window > 0, window, 0x3FFFFFFF)
    # keys that any row of this program sees, and this part's share of them
    end = past + tl.minimum(first + BM - 1, S * group - 1) // group + 1
    start = tl.maximum(past + first // group - reach + 1, 0)
    share = tl.cdiv(tl.cdiv(end - start, parts), BN) * BN
    start += part * share
    end = tl.minimum(end, start + share)

    keys = key_ptr + tl.program_id(1).to(tl.int64) * positions * (D * key_bits // 8 + 4)
    values = value_ptr + tl.program_id(1).to(tl.int64) * positions * (D * value_bits // 8 + 4)
    top = tl.full((BM,), FAR, tl.float32)
    divisor = tl.zeros((BM,), tl.float32)
    average = tl.zeros((BM, BD), tl.float32)
    for first_key in range(start, end, BN):
        j = first_key + tl.arange(0, BN)
        k = cache_tile(keys, j, end, D, key_bits, BD)
        z = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        if softcap > 0:
            z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0))
        seen = (j[None, :] <= q_position[:, None]) & (j < end)[None, :]
        seen = seen & (j[None, :] > q_position[:, None] - reach)
        higher = tl.maximum(top, tl.max(tl.where(seen, z, FAR), axis=1))
        p = tl.where(seen, tl.exp(z - higher[:, None]), 0.0)
        fade = tl.exp(top - higher)
        divisor = divisor * fade + tl.sum(p, axis=1)
        v = cache_tile(values, j, end, D, value_bits, BD)
        average = tl.dot(p, v, average * fade[:, None], input_precision="tf32x3")
        top = higher
    inside = live[:, None] & (d < D)[None, :]
    if parts == 1:
        tl.store(output_ptr + place[:, None] * D + d[None, :], average / divisor[:, None], mask=inside)
    else:
        at = place * parts + part
        tl.store(parts_ptr + at[:, None] * D + d[None, :], average, mask=inside)
        tl.store(weights_ptr + at * 2, top, mask=live)
        tl.store(weights_ptr + at * 2 + 1, divisor, mask=live)


@triton.jit(repr=named("combine_parts"))
def combine_parts(parts_ptr, weights_ptr, output_ptr, D, parts, BD: tl.constexpr, PARTS: tl.constexpr):
    """One row of output from its parts."""
    place = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PARTS)
    d = tl.arange(0, BD)
    at = place * parts + i
    held = i < parts
    top = tl.load(weights_ptr + at * 2, mask=held, other=FAR)
    weight = tl.where(held, tl.exp(top - tl.max(top, axis=0)), 0.0)
    divisor = tl.sum(weight * tl.load(weights_ptr + at * 2 + 1, mask=held, other=0.0), axis=0)
    x = tl.load(parts_ptr + at[:, None] * D + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
    tl.store(output_ptr + place * D + d, tl.sum(weight[:, None] * x, axis=0) / divisor, mask=d < D)
