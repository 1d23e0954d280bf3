"""Weights in the panel layout of the `bdq` operators (docs/ops.md, "Panel layout"): packed once, read in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LANES = 16
"""Output channels of a panel."""
CHUNK = 64
"""Input channels of a chunk."""
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclass(frozen=True, eq=False)
class PanelWeight:
    """The two initializers of a linear operator.

    Attributes:
        codes: uint8 `[panels, chunks, 128 * bits]`.
        scales: float16 `[panels, blocks, 16]`.
    """

    codes: Array
    scales: Array


def panel_shape(n: int, k: int, bits: int, gated: bool = False) -> tuple[int, int, int]:
    """Shape of the codes of `[n, k]` weights; `n` output channels of each half when `gated`."""
    return -(-n // LANES) * (2 if gated else 1), -(-k // CHUNK), 2 * CHUNK * bits


def pack_panels(codes: Array, bits: int) -> Array:
    """Pack codes `[N, K]` uint8, each below `2^bits`, to `[ceil(N/16), ceil(K/64), 128 * bits]` uint8.

    Raises:
        ValueError: bits without a layout, or a code that does not fit them.
    """
    planes = _planes(bits)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"a code is {int(codes.max())}, expected less than {1 << bits}")
    n, k = codes.shape
    padded = np.pad(codes, ((0, -n % LANES), (0, -k % CHUNK)))
    panels, chunks = padded.shape[0] // LANES, padded.shape[1] // CHUNK
    tiles = padded.reshape(panels, LANES, chunks, CHUNK).transpose(0, 2, 1, 3)
    packed, shift = [], 0
    for width in planes:
        fields = 8 // width
        part = (tiles >> np.uint8(shift)) & np.uint8((1 << width) - 1)
        # [panels, chunks, lane, vector, field, j] -> bytes [panels, chunks, vector, lane, j]
        part = part.reshape(panels, chunks, LANES, CHUNK // (4 * fields), fields, 4).transpose(0, 1, 3, 2, 5, 4)
        moved = part << (np.arange(fields, dtype=np.uint8) * np.uint8(width))
        packed.append(np.bitwise_or.reduce(moved, axis=-1).reshape(panels, chunks, -1))
        shift += width
    return np.ascontiguousarray(np.concatenate(packed, axis=-1))


def unpack_panels(packed: Array, bits: int, n: int, k: int) -> Array:
    """The inverse of `pack_panels`: codes `[n, k]` uint8.

    Raises:
        ValueError: bits without a layout, or a shape that is not `panel_shape(n, k, bits)`.
    """
    planes = _planes(bits)
    if packed.shape != panel_shape(n, k, bits):
        raise ValueError(f"packed codes are {packed.shape}, expected {panel_shape(n, k, bits)} for {(n, k)}")
    panels, chunks, _ = packed.shape
    codes = np.zeros((panels, chunks, LANES, CHUNK), np.uint8)
    start, shift = 0, 0
    for width in planes:
        fields, size = 8 // width, LANES * CHUNK * width // 8
        part = packed[..., start : start + size].reshape(panels, chunks, -1, LANES, 4, 1)
        split = (part >> (np.arange(fields, dtype=np.uint8) * np.uint8(width))) & np.uint8((1 << width) - 1)
        codes |= split.transpose(0, 1, 3, 2, 5, 4).reshape(codes.shape) << np.uint8(shift)
        start += size
        shift += width
    return codes.transpose(0, 2, 1, 3).reshape(panels * LANES, chunks * CHUNK)[:n, :k]


def pack_scales(scales: Array) -> Array:
    """Pack scales `[N, blocks]` to float16 `[ceil(N/16), blocks, 16]`, 0 for padding rows."""
    n, blocks = scales.shape
    padded = np.pad(scales.astype(np.float16), ((0, -n % LANES), (0, 0)))
    return np.ascontiguousarray(padded.reshape(-1, LANES, blocks).transpose(0, 2, 1))


def unpack_scales(packed: Array, n: int) -> Array:
    """The inverse of `pack_scales`: float16 `[n, blocks]`."""
    panels, blocks, lanes = packed.shape
    return packed.transpose(0, 2, 1).reshape(panels * lanes, blocks)[:n]


def interleave_panels(gate: Array, up: Array) -> Array:
    """Panels of a gated linear: those of `gate` and `up` in turn (codes or scales)."""
    return np.ascontiguousarray(np.stack([gate, up], axis=1).reshape(2 * gate.shape[0], *gate.shape[1:]))


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in _PLANES:
        raise ValueError(f"weight bits are {bits}, expected one of {tuple(_PLANES)}")
    return _PLANES[bits]
