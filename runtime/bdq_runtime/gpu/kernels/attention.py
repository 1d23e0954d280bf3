"""Attention over the packed cache, in one or several parts of the text (docs/ops.md, "Quantized-KV attention", 4).

Codes of the cache have at most 8 bits, exact in float16, so tensor cores multiply them as they are: scales and zero
points go around the matmuls. The other side, queries and weights, is the sum of two float16 (22 bits).
"""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.cache import past_of
from bdq_runtime.gpu.kernels.halves import LOW, channels, halves_of, power_of_two
from bdq_runtime.gpu.kernels.names import named
from bdq_runtime.gpu.kernels.panels import code3, field, join4

FAR: tl.constexpr = tl.constexpr(-3.0e38)  # a maximum of nothing; finite, so that differences are


@triton.jit
def code_tile(cache_ptr, j, held, D, bits, BN: tl.constexpr, BD: tl.constexpr, ASM: tl.constexpr):
    """Codes of rows j `[BN]` of one head, float16 `[BN, BD]`, places as `channels` says; 0 where not held."""
    u = tl.zeros((BN, BD), tl.uint8)
    if bits == 8:
        i8 = tl.arange(0, BD)
        row8 = cache_ptr + (j.to(tl.int64) * (D // 4 + 1)) * 4
        u = tl.load(row8[:, None] + i8[None, :], mask=held[:, None] & (i8 < D)[None, :], other=0)
    elif bits == 4:
        i4 = tl.arange(0, BD // 2)
        row4 = cache_ptr + (j.to(tl.int64) * (D // 8 + 1)) * 4
        b4 = tl.load(row4[:, None] + i4[None, :], mask=held[:, None] & (i4 < D // 2)[None, :], other=0)
        u = tl.reshape(tl.join(field(b4, 0, 15, ASM), field(b4, 4, 15, ASM)), (BN, BD))
    else:
        i3 = tl.arange(0, BD // 8)
        row3 = (cache_ptr + j.to(tl.int64) * (D * 3 // 8 + 4))[:, None] + i3[None, :]
        inside = held[:, None] & (i3 < D // 8)[None, :]
        a = tl.load(row3, mask=inside, other=0)
        b = tl.load(row3 + D // 8, mask=inside, other=0)
        h = tl.load(row3 + D // 4, mask=inside, other=0)
        even = join4(code3(a, h, 0, 0, ASM), code3(a, h, 2, 2, ASM), code3(a, h, 4, 4, ASM), code3(a, h, 6, 6, ASM))
        odd = join4(code3(b, h, 0, 1, ASM), code3(b, h, 2, 3, ASM), code3(b, h, 4, 5, ASM), code3(b, h, 6, 7, ASM))
        u = tl.reshape(tl.join(even, odd), (BN, BD))
    # 1024 + code has the code in its lowest bits
    return (u.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True) - 1024.0


@triton.jit
def scales_of(cache_ptr, j, held, D, bits):
    """Scales and zero points of rows j, float32; they are aligned to words but for 3 bits."""
    word = tl.zeros(j.shape, tl.int32)
    if bits == 3:
        ends = cache_ptr + j.to(tl.int64) * (D * 3 // 8 + 4) + D * 3 // 8
        for i in tl.static_range(4):
            word = word | (tl.load(ends + i, mask=held, other=0).to(tl.int32) << (8 * i))
    else:
        words = cache_ptr.to(tl.pointer_type(tl.int32))
        word = tl.load(words + j.to(tl.int64) * (D * bits // 32 + 1) + D * bits // 32, mask=held, other=0)
    s = (((word & 0xFFFF) << 13) + (95 << 23)).to(tl.float32, bitcast=True)
    return s, (((word >> 16) & 0xFFFF) - 32768).to(tl.float32)


@triton.jit(repr=named("cached_attention"))
def cached_attention(
    high_ptr, low_ptr, factors_ptr, key_ptr, value_ptr, seqlens_ptr, output_ptr, parts_ptr, weights_ptr,
    S, total, positions, heads, kv_heads, D, key_bits, value_bits, softcap, window, parts,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """Programs (rows of BM, KV head of a batch row, part). A row is a token and a query head of the KV head's group.

    Queries are as `attention_rows` stores them, high and low `[B, S, heads, D]`, factors `[B, S, heads, 2]`.
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
    place = (b * S + token).to(tl.int64) * heads + kv_head * group + r % group
    q_position = past + token

    d = tl.arange(0, BD)
    inside = live[:, None] & (d < D)[None, :]
    q_high = tl.load(high_ptr + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    q_low = tl.load(low_ptr + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    unit = tl.load(factors_ptr + place * 2, mask=live, other=0.0)
    q_sum = tl.load(factors_ptr + place * 2 + 1, mask=live, other=0.0)

    reach = tl.where(window > 0, window, 0x3FFFFFFF)
    # keys that any row of this program sees, and this part's share of them
    end = past + tl.minimum(first + BM - 1, S * group - 1) // group + 1
    start = tl.maximum(past + first // group - reach + 1, 0)
    share = tl.cdiv(tl.cdiv(end - start, parts), BN) * BN
    start += part * share
    end = tl.minimum(end, start + share)

    keys = key_ptr + tl.program_id(1).to(tl.int64) * positions * (D * key_bits // 8 + 4)
    values = value_ptr + tl.program_id(1).to(tl.int64) * positions * (D * value_bits // 8 + 4)
    if key_bits != 3:
        keys = key_ptr + (tl.program_id(1).to(tl.int64) * positions * (D * key_bits // 32 + 1)) * 4
    if value_bits != 3:
        values = value_ptr + (tl.program_id(1).to(tl.int64) * positions * (D * value_bits // 32 + 1)) * 4
    top = tl.full((BM,), FAR, tl.float32)
    divisor = tl.zeros((BM,), tl.float32)
    average = tl.zeros((BM, BD), tl.float32)
    for first_key in range(start, end, BN):
        j = first_key + tl.arange(0, BN)
        held = j < end
        k = tl.trans(code_tile(keys, j, held, D, key_bits, BN, BD, ASM))
        dots = tl.dot(q_high, k, tl.dot(q_low, k) * (1.0 / LOW))
        s, zero = scales_of(keys, j, held, D, key_bits)
        z = s[None, :] * (dots * unit[:, None] - zero[None, :] * q_sum[:, None])
        if softcap > 0:
            z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (z / softcap)) + 1.0))
        seen = (j[None, :] <= q_position[:, None]) & held[None, :] & (j[None, :] > q_position[:, None] - reach)
        higher = tl.maximum(top, tl.max(tl.where(seen, z, FAR), axis=1))
        p = tl.where(seen, tl.exp(z - higher[:, None]), 0.0)
        fade = tl.exp(top - higher)
        divisor = divisor * fade + tl.sum(p, axis=1)
        s, zero = scales_of(values, j, held, D, value_bits)
        s = tl.where(held, s, 0.0)
        v_unit, v_inverse = power_of_two(tl.max(s, axis=0))
        p_high, p_low = halves_of(p * (s * v_inverse)[None, :])
        v = code_tile(values, j, held, D, value_bits, BN, BD, ASM)
        dots = tl.dot(p_high, v, tl.dot(p_low, v) * (1.0 / LOW)) * v_unit
        offset = tl.sum(p * (s * zero)[None, :], axis=1)
        average = average * fade[:, None] + (dots - offset[:, None])
        top = higher
    d = channels(value_bits, D, BD)
    inside = live[:, None] & (d < D)[None, :]
    if parts == 1:
        tl.store(output_ptr + place[:, None] * D + d[None, :], average / divisor[:, None], mask=inside)
    else:
        at = place * parts + part
        tl.store(parts_ptr + at[:, None] * D + d[None, :], average, mask=inside)
        tl.store(weights_ptr + at * 2, top, mask=live)
        tl.store(weights_ptr + at * 2 + 1, divisor, mask=live)


@triton.jit(repr=named("combine_parts"))
def combine_parts(parts_ptr, weights_ptr, output_ptr, D, parts, PARTS: tl.constexpr):
    """One row of output from its parts."""
    place = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, PARTS)
    at = place * parts + i
    held = i < parts
    top = tl.load(weights_ptr + at * 2, mask=held, other=FAR)
    weight = tl.where(held, tl.exp(top - tl.max(top, axis=0)), 0.0)
    divisor = tl.sum(weight * tl.load(weights_ptr + at * 2 + 1, mask=held, other=0.0), axis=0)
    for first in range(0, D, 64):
        d = first + tl.arange(0, 64)
        x = tl.load(parts_ptr + at[:, None] * D + d[None, :], mask=held[:, None] & (d < D)[None, :], other=0.0)
        tl.store(output_ptr + place * D + d, tl.sum(weight[:, None] * x, axis=0) / divisor, mask=d < D)
