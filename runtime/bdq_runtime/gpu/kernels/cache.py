"""Rows of the KV cache: RoPE, Hadamard, quantize, append (docs/ops.md, "Quantized-KV attention", 1 to 3). All exact."""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.halves import halves_of, power_of_two
from bdq_runtime.gpu.kernels.names import named
from bdq_runtime.gpu.kernels.rows import butterfly, round_even


@triton.jit
def past_of(seqlens_ptr, b, S, total):
    """Tokens behind those of row b."""
    return tl.where(total == S, 0, tl.load(seqlens_ptr + b) + 1 - S)


@triton.jit
def store_row(x, row_ptr, D, bits, clip, BD: tl.constexpr):
    """Quantize x `[BD]`, of which D count, to `D * bits / 8 + 4` bytes."""
    d = tl.arange(0, BD)
    hi = tl.max(tl.where(d < D, x, float("-inf")), axis=0) * clip
    lo = tl.min(tl.where(d < D, x, float("inf")), axis=0) * clip
    high = (1 << bits) - 1
    # float32(1 / (2^b - 1)), which div_rn rounds as NumPy does
    r = (hi - lo) * tl.div_rn(1.0, high.to(tl.float32))
    r = tl.maximum(tl.maximum(r, tl.maximum(tl.abs(hi), tl.abs(lo)) * 6.103515625e-05), 2.3283064365386963e-10)
    # the float's own bits are exponent and mantissa: 10 of the latter are kept, half to even
    t = r.to(tl.int32, bitcast=True) - (95 << 23)
    code16 = tl.minimum((t + 0xFFF + ((t >> 13) & 1)) >> 13, 65535)
    s = ((code16 << 13) + (95 << 23)).to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, s)
    z = round_even(-lo * inverse)
    code = tl.minimum(tl.maximum(round_even(x * inverse) + z, 0.0), high.to(tl.float32)).to(tl.int32)
    low_bits = tl.where(bits == 3, 2, bits)
    fields = 8 // low_bits
    plane = D // fields
    packed = tl.zeros((BD,), tl.int32)
    for t in tl.static_range(4):
        part = tl.gather(code, tl.minimum(t * plane + d, BD - 1), axis=0) & ((1 << low_bits) - 1)
        packed = packed | tl.where(t < fields, part << (t * low_bits), 0)
    tl.store(row_ptr + d, packed.to(tl.uint8), mask=d < plane)
    if bits == 3:
        packed = tl.zeros((BD,), tl.int32)
        for t in tl.static_range(8):
            part = tl.gather(code, tl.minimum(t * (D // 8) + d, BD - 1), axis=0) >> 2
            packed = packed | (part << t)
        tl.store(row_ptr + plane + d, packed.to(tl.uint8), mask=d < D // 8)
    ends = tl.arange(0, 4)
    word = tl.where(ends < 2, code16, z.to(tl.int32) + 32768) >> (8 * (ends % 2))
    tl.store(row_ptr + D * bits // 8 + ends, (word & 255).to(tl.uint8))


@triton.jit(repr=named("attention_rows"))
def attention_rows(
    query_ptr, key_ptr, value_ptr, seqlens_ptr, cos_ptr, sin_ptr, high_ptr, low_ptr, factors_ptr,
    present_key_ptr, present_value_ptr,
    query_stride, key_stride, value_stride, S, total, positions, heads, kv_heads, D, half, log_n, grid, root,
    key_bits, value_bits, key_clip, value_clip, scale, BD: tl.constexpr
):  # fmt: skip
    """Programs (token, head, batch row); heads are those of query, key, value in turn.

    Keys and values go to present. Query heads go to high and low `[B, S, heads, D]`, channels in the order of
    `channels`, with factors `[B, S, heads, 2]`: what both are multiplied by, and the sum of the query; both times
    `scale`. `half` is rotary_dim / 2, 0 for none; `log_n` is log2(D) for a Hadamard, 0 for none.
    """
    i, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = (b * S + i).to(tl.int64)
    position = past_of(seqlens_ptr, b, S, total) + i
    d = tl.arange(0, BD)
    kv_head = head - heads
    source = query_ptr + token * query_stride + head * D
    if head >= heads:
        source = key_ptr + token * key_stride + kv_head * D
    if head >= heads + kv_heads:
        kv_head -= kv_heads
        source = value_ptr + token * value_stride + kv_head * D
    x = tl.load(source + d, mask=d < D, other=0.0)
    if head < heads + kv_heads:
        turned = d < 2 * half
        partner = tl.load(source + tl.where(d < half, d + half, d - half), mask=turned, other=0.0)
        angle = position.to(tl.int64) * half + tl.where(d < half, d, d - half)
        cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
        x = tl.where(turned, x * cos + tl.where(d < half, -partner, partner) * sin, x)
        if log_n > 0:
            step = tl.maximum(tl.max(tl.abs(x), axis=0) * grid, 1e-30)
            x = butterfly(round_even(x * tl.div_rn(1.0, step)), log_n, BD) * (step * root)
    if head < heads:
        place = token * heads + head
        unit, inverse = power_of_two(tl.max(tl.abs(x), axis=0))
        upper, lower = halves_of(x * inverse)
        log_fields = tl.where(key_bits == 8, 0, tl.where(key_bits == 4, 1, 3))
        span = D >> log_fields
        at = place * D + ((d % span) << log_fields) + d // span
        tl.store(high_ptr + at, upper, mask=d < D)
        tl.store(low_ptr + at, lower, mask=d < D)
        tl.store(factors_ptr + place * 2, unit * scale)
        tl.store(factors_ptr + place * 2 + 1, tl.sum(x, axis=0) * scale)
    else:
        is_key = head < heads + kv_heads
        bits = tl.where(is_key, key_bits, value_bits)
        clip = tl.where(is_key, key_clip, value_clip)
        row = ((b * kv_heads + kv_head).to(tl.int64) * positions + position) * (D * bits // 8 + 4)
        row_ptr = present_key_ptr + row
        if head >= heads + kv_heads:
            row_ptr = present_value_ptr + row
        store_row(x, row_ptr, D, bits, clip, BD)


@triton.jit(repr=named("move_cache"))
def move_cache(past_ptr, present_ptr, past_size, present_size, BLOCK: tl.constexpr, WORDS: tl.constexpr):
    """Each head's past to the front of its present, 0 behind it; sizes of a head, in words where WORDS."""
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    held = tl.load(past_ptr + head * past_size + i, mask=i < past_size, other=0)
    tl.store(present_ptr + head * present_size + i, held, mask=i < present_size)
