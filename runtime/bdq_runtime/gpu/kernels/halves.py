"""Floats as two float16 for tensor cores, and where the channels of a cache row lie in a tile of codes."""

import triton
import triton.language as tl

LOW: tl.constexpr = tl.constexpr(2048.0)  # what the lower half of a number is scaled by


@triton.jit
def channels(bits, D, BD: tl.constexpr):
    """Channel of each place of `code_tile`; D or more where there is none."""
    p = tl.arange(0, BD)
    log_fields = tl.where(bits == 8, 0, tl.where(bits == 4, 1, 3))
    within = p & ((1 << log_fields) - 1)
    return tl.where(p < D, within * (D >> log_fields) + (p >> log_fields), D)


@triton.jit
def power_of_two(x):
    """The largest power of two that is not above x >= 0, and its inverse; any for 0."""
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, 1 << 23), 253 << 23)
    return exponent.to(tl.float32, bitcast=True), ((254 << 23) - exponent).to(tl.float32, bitcast=True)


@triton.jit
def halves_of(x):
    """float16 h and l with x = h + l / LOW to 22 bits; |x| < 2."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW).to(tl.float16)
