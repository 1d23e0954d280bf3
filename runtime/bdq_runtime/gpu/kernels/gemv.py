"""Low-bit matmul for a few tokens: a program streams two panels once and multiplies four bytes at a time."""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.epilogue import store_outputs
from bdq_runtime.gpu.kernels.names import named


@triton.jit
def dot4(u, a, acc, ASM: tl.constexpr):
    """acc + Σ of four unsigned bytes of u times four signed ones of a; int32 words."""
    if ASM:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [u, a, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for j in tl.static_range(4):
            acc += ((u >> (8 * j)) & 255) * ((a << (24 - 8 * j)) >> 24)
        return acc


@triton.jit
def code_words(w_ptr, lane, g, mask, T: tl.constexpr, BITS: tl.constexpr):
    """Codes of four columns of each channel: field T of vector g (of 32 columns g at 3 bits), int32 `[KG, 32]`."""
    if BITS == 3:
        start = (g // 2) * 96
        half = (g % 2) * 32 + (T // 4) * 16
        low = tl.load(w_ptr + (start + half)[:, None] + lane, mask=mask, other=0)
        high = tl.load(w_ptr + (start + 64 + (g % 2) * 16)[:, None] + lane, mask=mask, other=0)
        return ((low >> (2 * (T % 4))) & 0x03030303) | (((high >> T) & 0x01010101) << 2)
    else:
        word = tl.load(w_ptr + (g * 16)[:, None] + lane, mask=mask, other=0)
        if BITS == 8:
            return word
        else:
            return (word >> (BITS * T)) & (0x01010101 * ((1 << BITS) - 1))


@triton.jit(repr=named("low_bit_gemv"))
def low_bit_gemv(
    q_ptr, scale_ptr, total_ptr, weight_ptr, scales_ptr, bias_ptr, y_ptr,
    N, rows, padded, multiple, zero, blocks, log_block, gate, has_bias,
    BITS: tl.constexpr, KG: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """y `[M, N]`: a program makes 32 rows of panels for one token; q is in the order of the columns (one field).

    q, weight: int32 words. Blocks are summed word by word, which is the same sum in another order.
    """
    FIELDS: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    row = tl.program_id(0)
    first = tl.program_id(1) * 32
    r = tl.minimum(first + tl.arange(0, 32), rows - 1)
    lane = ((r // 16).to(tl.int64) * ((padded // 2) * BITS) + r % 16)[None, :]
    scale_row = (r // 16) * blocks * 16 + r % 16
    q_row = q_ptr + row.to(tl.int64) * (padded // 4)
    s = tl.load(scale_ptr + row)
    groups = padded // (4 * FIELDS)
    if blocks == 1:
        acc = tl.zeros((KG, 32), tl.int32)
        for start in range(0, groups, KG):
            g = start + tl.arange(0, KG)
            mask = (g < groups)[:, None]
            for t in tl.static_range(FIELDS):
                a = tl.load(q_row + g * FIELDS + t, mask=g < groups, other=0)
                u = code_words(weight_ptr, lane, g, mask, t, BITS)
                acc = dot4(u, tl.broadcast_to(a[:, None], (KG, 32)), acc, ASM)
        total = tl.sum(acc, axis=0) * multiple - zero * tl.load(total_ptr + row)
        value = (total.to(tl.float32) * s) * tl.load(scales_ptr + scale_row).to(tl.float32)
    else:
        parts = tl.zeros((KG, 32), tl.float32)
        for start in range(0, groups, KG):
            g = start + tl.arange(0, KG)
            mask = (g < groups)[:, None]
            acc = tl.zeros((KG, 32), tl.int32)
            offset = tl.zeros((KG,), tl.int32)
            for t in tl.static_range(FIELDS):
                a = tl.load(q_row + g * FIELDS + t, mask=g < groups, other=0)
                u = code_words(weight_ptr, lane, g, mask, t, BITS)
                acc = dot4(u, tl.broadcast_to(a[:, None], (KG, 32)), acc, ASM)
                offset = dot4(tl.full((KG,), 0x01010101, tl.int32), a, offset, ASM)
            block = tl.minimum((g * (4 * FIELDS)) >> log_block, blocks - 1)
            scale = tl.load(scales_ptr + scale_row[None, :] + (block * 16)[:, None], mask=mask, other=0.0)
            parts += (acc * multiple - (zero * offset)[:, None]).to(tl.float32) * scale.to(tl.float32)
        value = tl.sum(parts, axis=0) * s
    m = row + tl.arange(0, 1)
    store_outputs(value[:, None], y_ptr, bias_ptr, first, m, row + 1, N, gate, has_bias, 32, 1)
