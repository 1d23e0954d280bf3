"""Codes out of weight panels (docs/ops.md, "Panel layout")."""

import triton
import triton.language as tl


@triton.constexpr_function
def _field_asm(shift, mask):
    moved = f"shr.u32 t, $1, {shift};" if shift else "mov.b32 t, $1;"
    return "{ .reg .b32 t; " + moved + f" and.b32 $0, t, 0x{mask * 0x01010101:08x};" + " }"


@triton.jit
def field(b, SHIFT: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr):
    """`(b >> SHIFT) & MASK` of each byte; ASM does four bytes at once, which the interpreter cannot."""
    if ASM:
        return tl.inline_asm_elementwise(_field_asm(SHIFT, MASK), "=r,r", [b], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        return (b >> SHIFT) & MASK


@triton.jit
def join4(f0, f1, f2, f3):
    """`[...] x 4 -> [..., 4]`, flat on the last two axes."""
    return tl.join(tl.join(f0, f2), tl.join(f1, f3))


@triton.jit
def code3(low, high, SHIFT: tl.constexpr, BIT: tl.constexpr, ASM: tl.constexpr):
    """A 3-bit code of its 2-bit plane and its 1-bit plane."""
    if BIT >= 2:
        return field(low, SHIFT, 3, ASM) | field(high, BIT - 2, 4, ASM)
    else:
        return field(low, SHIFT, 3, ASM) | (field(high, BIT, 1, ASM) << 2)


@triton.jit
def weight_tile(w_ptr, base, step, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr):
    """int8 `[BN, BK]`: codes of columns step * BK .. of the channels at bytes `base [BN]`; 8-bit codes less 128.

    The columns of each group of 4 * fields lie as `quantize_rows` stores activations.
    """
    if BITS == 8:
        i = tl.arange(0, BK)
        b = tl.load(w_ptr + base[:, None] + (step * (BK * 16) + (i // 4) * 64 + i % 4)[None, :])
        return (b ^ 128).to(tl.int8, bitcast=True)
    elif BITS == 4:
        i = tl.arange(0, BK // 2)
        b = tl.load(w_ptr + base[:, None] + (step * (BK * 8) + (i // 4) * 64 + i % 4)[None, :])
        u = tl.join(field(b, 0, 15, ASM), field(b, 4, 15, ASM))
        return tl.reshape(u, (BN, BK)).to(tl.int8, bitcast=True)
    elif BITS == 2:
        i = tl.arange(0, BK // 4)
        b = tl.load(w_ptr + base[:, None] + (step * (BK * 4) + (i // 4) * 64 + i % 4)[None, :])
        u = join4(field(b, 0, 3, ASM), field(b, 2, 3, ASM), field(b, 4, 3, ASM), field(b, 6, 3, ASM))
        return tl.reshape(u, (BN, BK)).to(tl.int8, bitcast=True)
    else:
        i = tl.arange(0, BK // 8)
        unit = step * (BK // 32) + i // 4
        start = (unit // 2) * 384 + i % 4
        half = unit % 2
        a = tl.load(w_ptr + base[:, None] + (start + half * 128)[None, :])
        b = tl.load(w_ptr + base[:, None] + (start + half * 128 + 64)[None, :])
        h = tl.load(w_ptr + base[:, None] + (start + half * 64 + 256)[None, :])
        even = join4(code3(a, h, 0, 0, ASM), code3(a, h, 4, 2, ASM), code3(b, h, 0, 4, ASM), code3(b, h, 4, 6, ASM))
        odd = join4(code3(a, h, 2, 1, ASM), code3(a, h, 6, 3, ASM), code3(b, h, 2, 5, ASM), code3(b, h, 6, 7, ASM))
        return tl.reshape(tl.join(even, odd), (BN, BK)).to(tl.int8, bitcast=True)
