"""What the bits of a quantized weight mean: codes, scales, zero points, and their bytes in memory.

A code is always unsigned: `value = (code - zero_point) * scale`, with `zero_point = 2^(bits-1)` where none is stored.
On the odd grid `value = (2 code - (2^bits - 1)) * scale`: as many levels below zero as above, none at zero.
Weights are `[N, K]` (rows are output channels); a block is `block_size` consecutive columns of one row.
The byte layout is the one of `com.microsoft::MatMulNBits`: per block a little-endian bit stream, low bits first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output row of a weight."""


@dataclass(frozen=True)
class PerToken:
    """One scale for each token of an activation."""


@dataclass(frozen=True)
class PerBlock:
    """One scale for each `size` consecutive columns of a row."""

    size: int


Granularity = PerTensor | PerChannel | PerToken | PerBlock

INTEGER = "integer"
ODD = "odd"
_ODD_BITS = (2, 3, 4)


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        bits: 2 to 8.
        granularity: what shares one scale.
        symmetric: no zero points are stored.
        dynamic: scales are computed when the model runs.
        grid: "integer", or "odd": symmetric weights of 2 to 4 bits whose levels are the odd multiples of the scale.

    Raises:
        ValueError: `bits` outside 2..8, a block size that is no power of two from 16 to 256, or a grid that is none of
            the two or that the rest of the spec does not have.
    """

    bits: int
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    grid: str = INTEGER

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}, expected 2 to 8")
        if isinstance(self.granularity, PerBlock) and self.granularity.size not in (16, 32, 64, 128, 256):
            raise ValueError(f"block size is {self.granularity.size}, expected 16, 32, 64, 128 or 256")
        if self.grid not in (INTEGER, ODD):
            raise ValueError(f"grid is {self.grid!r}, expected {INTEGER!r} or {ODD!r}")
        if self.grid == ODD and (self.bits not in _ODD_BITS or not self.symmetric):
            kind = "symmetric" if self.symmetric else "asymmetric"
            raise ValueError(f"the odd grid with {kind} {self.bits} bits, expected symmetric 2, 3 or 4 bits")

    def block_size(self, columns: int) -> int:
        """Columns that share one scale in a row of `columns` columns."""
        return self.granularity.size if isinstance(self.granularity, PerBlock) else columns


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight, unpacked.

    Attributes:
        codes: `[N, K]` uint8, each below `2^bits`.
        scales: `[N, ceil(K / block)]` float32; may be negative.
        zero_points: `[N, ceil(K / block)]` uint8, or None for `2^(bits-1)` everywhere.
        spec: bits and granularity; `symmetric` exactly when `zero_points` is None.
    """

    codes: Array
    scales: Array
    zero_points: Array | None
    spec: QuantSpec

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        blocks = -(-k // self.spec.block_size(k))
        if self.scales.shape != (n, blocks):
            raise ValueError(f"scales are {self.scales.shape}, expected {(n, blocks)} for codes {(n, k)}")
        if self.zero_points is not None and self.zero_points.shape != (n, blocks):
            raise ValueError(f"zero points are {self.zero_points.shape}, expected {(n, blocks)}")
        if self.codes.dtype != np.uint8 or self.scales.dtype != np.float32:
            raise ValueError(f"codes {self.codes.dtype}, scales {self.scales.dtype}: expected uint8, float32")
        if self.spec.symmetric != (self.zero_points is None):
            raise ValueError("zero points go with an asymmetric spec, and only with one")

    def dequantize(self) -> Array:
        """`[N, K]` float32: `(code - zero_point) * scale`, or `(2 code - (2^bits - 1)) * scale` on the odd grid."""
        k = self.codes.shape[1]
        block = self.spec.block_size(k)
        spread = np.repeat(self.scales, block, axis=1)[:, :k]
        if self.spec.grid == ODD:
            odd: Array = (2 * self.codes.astype(np.float32) - ((1 << self.spec.bits) - 1)) * spread
            return odd
        zero: Array = (
            np.full(self.scales.shape, 1 << (self.spec.bits - 1), np.float32)
            if self.zero_points is None
            else self.zero_points.astype(np.float32)
        )
        result: Array = (self.codes.astype(np.float32) - np.repeat(zero, block, axis=1)[:, :k]) * spread
        return result


def concatenate_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """One weight whose rows are those of `parts` in order (q, k and v as one matmul); all share one spec."""
    spec = parts[0].spec
    if any(part.spec != spec for part in parts):
        raise ValueError(f"specs differ: {[part.spec for part in parts]}")
    zeros = None
    if not spec.symmetric:
        zeros = np.concatenate([part.zero_points for part in parts if part.zero_points is not None])
    return QuantizedWeight(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        zeros,
        spec,
    )


def pack_bits(codes: Array, bits: int) -> Array:
    """Pack the last axis of uint8 `codes` into a little-endian bit stream: `[..., n]` -> `[..., ceil(n*bits/8)]`."""
    if bits == 8:
        return codes
    if bits in (2, 4):
        per = 8 // bits
        pad = -codes.shape[-1] % per
        padded = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, pad)]) if pad else codes
        packed: Array = padded[..., 0::per].copy()
        for i in range(1, per):
            packed |= padded[..., i::per] << np.uint8(i * bits)
        return packed
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """The inverse of `pack_bits` for `count` codes on the last axis."""
    if bits == 8:
        return packed[..., :count]
    stream = np.unpackbits(packed, axis=-1, bitorder="little", count=count * bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    result: Array = (stream.reshape(*packed.shape[:-1], count, bits) * weights).sum(-1, dtype=np.uint8)
    return result


def pack_codes(weight: QuantizedWeight) -> Array:
    """Codes in the layout of MatMulNBits: `[N, blocks, ceil(block * bits / 8)]` uint8, a view at 8 bits.

    The last block of a row is padded with code 0 where K is no multiple of the block size.
    """
    n, k = weight.codes.shape
    block = weight.spec.block_size(k)
    blocks = weight.scales.shape[1]
    pad = blocks * block - k
    codes = np.pad(weight.codes, ((0, 0), (0, pad))) if pad else weight.codes
    return pack_bits(codes.reshape(n, blocks, block), weight.spec.bits)


def pack_matmul_nbits(weight: QuantizedWeight) -> tuple[Array, Array, Array | None]:
    """Initializers of a MatMulNBits node: B (see `pack_codes`), scales `[N, blocks]`, packed zero points or None.

    Raises:
        ValueError: a weight on the odd grid, which that operator does not have.
    """
    if weight.spec.grid == ODD:
        raise ValueError("a weight on the odd grid, but MatMulNBits has integer zero points only")
    zeros = None if weight.zero_points is None else pack_bits(weight.zero_points, weight.spec.bits)
    return pack_codes(weight), weight.scales, zeros


def with_blocks(weight: QuantizedWeight) -> QuantizedWeight:
    """`weight` with one scale for each block, which is what MatMulNBits reads; the same values.

    A scale of a whole row is repeated for blocks of the largest size up to 128 that divides the row (128 where none
    does). Kernels of every bit width compute in int8 at blocks of 32, 64 and 128.
    """
    if isinstance(weight.spec.granularity, PerBlock):
        return weight
    k = weight.codes.shape[1]
    block = next((size for size in (128, 64, 32, 16) if k % size == 0), 128)
    blocks = -(-k // block)
    return QuantizedWeight(
        weight.codes,
        np.repeat(weight.scales, blocks, axis=1),
        None if weight.zero_points is None else np.repeat(weight.zero_points, blocks, axis=1),
        replace(weight.spec, granularity=PerBlock(block)),
    )
