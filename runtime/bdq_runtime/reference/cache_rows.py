"""Rows of the quantized KV cache: codes in planes, a 16-bit scale, a zero point (docs/ops.md, "One row"): exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.opset import KV_BITS

Array = npt.NDArray[Any]

_PLANES = {3: (2, 1), 4: (4,), 8: (8,)}
_ZERO_OFFSET = 32768
TAIL_BYTES = 4
"""Bytes of a row behind its codes: scale and zero point."""


def row_bytes(head_size: int, bits: int) -> int:
    """Bytes of one row.

    Raises:
        ValueError: bits that no cache has, or a head size that is no multiple of 8.
    """
    if bits not in KV_BITS or head_size < 8 or head_size % 8:
        raise ValueError(f"cache of {bits} bits, head size {head_size}: expected 3, 4 or 8 bits, a multiple of 8")
    return head_size * bits // 8 + TAIL_BYTES


def encode_scale(range_: Array) -> Array:
    """The smallest steps `r` float32, at least 2^-32, as uint16: 6 bits of exponent, 10 of mantissa, monotone."""
    r = np.asarray(range_, np.float32)
    powers = np.float32(2) ** np.arange(-32, 32, dtype=np.float32)
    exponent = (powers <= r[..., None]).sum(-1) - 1
    mantissa = np.rint(r * powers[-1 - exponent] * np.float32(2048))
    # float32: a range beyond 2^31 gives more than an integer type holds, and the limit is what matters
    code = np.minimum(1024 * exponent.astype(np.float32) + mantissa - np.float32(1024), np.float32(65535))
    encoded: Array = code.astype(np.uint16)
    return encoded


def decode_scale(code: Array) -> Array:
    """float32 of 16-bit scales: a float's bits, moved."""
    bits = (code.astype(np.uint32) << np.uint32(13)) + np.uint32(95 << 23)
    scale: Array = bits.view(np.float32)
    return scale


def quantize_cache_rows(x: Array, bits: int, clip: float = 1.0) -> Array:
    """Rows uint8 `[..., D * bits / 8 + 4]` of `x [..., D]` float32."""
    codes, scale, zero = quantize_row_codes(x, bits, clip)
    tail = np.stack([scale, (zero + _ZERO_OFFSET).astype(np.uint16)], axis=-1).astype("<u2").view(np.uint8)
    return np.concatenate([*_pack_planes(codes, bits), tail], axis=-1)


def quantize_row_codes(x: Array, bits: int, clip: float = 1.0) -> tuple[Array, Array, Array]:
    """Codes uint8 `[..., D]`, scales uint16 `[...]`, zero points int32 `[...]` of `x [..., D]` float32."""
    row_bytes(x.shape[-1], bits)
    x = np.asarray(x, np.float32)
    levels = 2**bits - 1
    high, low = x.max(-1) * np.float32(clip), x.min(-1) * np.float32(clip)
    step = np.maximum((high - low) * np.float32(1 / levels), np.maximum(np.abs(high), np.abs(low)) * np.float32(2**-14))
    scale = encode_scale(np.maximum(step, np.float32(2**-32)))
    inverse = np.float32(1) / decode_scale(scale)
    zero = np.rint(-low * inverse)
    codes = np.clip(np.rint(x * inverse[..., None]) + zero[..., None], np.float32(0), np.float32(levels))
    return codes.astype(np.uint8), scale, zero.astype(np.int32)


def dequantize_cache_rows(rows: Array, head_size: int, bits: int) -> Array:
    """The float32 `[..., D]` that rows uint8 `[..., D * bits / 8 + 4]` stand for.

    Raises:
        ValueError: rows of another length.
    """
    if rows.shape[-1] != row_bytes(head_size, bits):
        raise ValueError(f"cache rows of {rows.shape[-1]} bytes, expected {row_bytes(head_size, bits)}")
    tail = np.ascontiguousarray(rows[..., -TAIL_BYTES:]).view("<u2")
    zero = tail[..., 1:].astype(np.int32) - _ZERO_OFFSET
    codes = _unpack_planes(rows[..., :-TAIL_BYTES], head_size, bits).astype(np.int32)
    result: Array = (codes - zero).astype(np.float32) * decode_scale(tail[..., :1])
    return result


def _pack_planes(codes: Array, bits: int) -> list[Array]:
    packed, shift = [], 0
    for width in _PLANES[bits]:
        fields = 8 // width
        part = (codes >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        part = (
            part.reshape(*codes.shape[:-1], fields, -1)
            << (np.arange(fields, dtype=np.uint8) * np.uint8(width))[:, None]
        )
        packed.append(np.bitwise_or.reduce(part, axis=-2))
        shift += width
    return packed


def _unpack_planes(packed: Array, head_size: int, bits: int) -> Array:
    codes = np.zeros((*packed.shape[:-1], head_size), np.uint8)
    start, shift = 0, 0
    for width in _PLANES[bits]:
        fields, size = 8 // width, head_size * width // 8
        part = packed[..., None, start : start + size] >> (np.arange(fields, dtype=np.uint8) * np.uint8(width))[:, None]
        codes |= (part & np.uint8((1 << width) - 1)).reshape(codes.shape) << np.uint8(shift)
        start += size
        shift += width
    return codes
