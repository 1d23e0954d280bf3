"""Rows of the quantized KV cache: docs/ops.md, "One row", bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export.fake_quant.rounding import Rounding, nearest, single

_LOW_BITS = 13
_OFFSET = 95 << 10
_LARGEST = 65535


@dataclass(frozen=True, eq=False)
class Rows:
    """Quantized rows `[..., D]`.

    Attributes:
        codes: `[..., D]` float32 integers, 0 to `2^bits - 1`.
        zeros: `[..., 1]` float32 integers.
        scales: `[..., 1]` float32, exact in 16 bits (see `encode_scales`).
    """

    codes: Tensor
    zeros: Tensor
    scales: Tensor

    def values(self) -> Tensor:
        """`(code - zero) * scale`."""
        return (self.codes - self.zeros) * self.scales


def encode_scales(ranges: Tensor) -> Tensor:
    """The 16-bit codes (int32) of positive float32 steps, at least 2^-32: 6 bits of exponent, 10 of mantissa."""
    bits = ranges.contiguous().view(torch.int32)
    # Half to even on the mantissa's upper ten bits; a carry goes into the exponent by itself.
    rounded = (bits + ((1 << (_LOW_BITS - 1)) - 1) + ((bits >> _LOW_BITS) & 1)) >> _LOW_BITS
    return (rounded - _OFFSET).clamp(0, _LARGEST)


def decode_scales(codes: Tensor) -> Tensor:
    """The float32 steps that `encode_scales` stands for."""
    return ((codes + _OFFSET) << _LOW_BITS).to(torch.int32).view(torch.float32)


def quantize_rows(x: Tensor, bits: int, clip: float | Tensor = 1.0, rounding: Rounding = nearest) -> Rows:
    """Quantize each row of `x` `[..., D]` float32.

    Args:
        x: rows are the keys or values of one token and head.
        bits: 3, 4 or 8.
        clip: part of a row's range that the grid covers; a tensor where it is learned.
        rounding: see `rounding.py`.
    """
    top = (1 << bits) - 1
    part = clip if isinstance(clip, Tensor) else single(clip)
    high, low = x.amax(-1, keepdim=True) * part, x.amin(-1, keepdim=True) * part
    largest = torch.maximum(high.abs(), low.abs())
    ranges = torch.maximum((high - low) * single(1 / top), largest * 2.0**-14).clamp_min(2.0**-32)
    # Rounded to 16 bits; gradients pass.
    scales = ranges + (decode_scales(encode_scales(ranges.detach())) - ranges).detach()
    if not scales.requires_grad:
        scales = decode_scales(encode_scales(ranges))
    inverse = 1.0 / scales
    zeros = rounding(-low * inverse)
    return Rows((rounding(x * inverse) + zeros).clamp(0, top), zeros, scales)


def fake_quantize_rows(x: Tensor, bits: int, clip: float | Tensor = 1.0, rounding: Rounding = nearest) -> Tensor:
    """The values that come back from the cache."""
    return quantize_rows(x, bits, clip, rounding).values()
