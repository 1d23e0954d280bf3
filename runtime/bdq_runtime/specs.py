"""How activations and the KV cache are quantized: what calibration decides, passes write and kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt


@dataclass(frozen=True)
class ActivationQuantization:
    """Dynamic, symmetric, one scale for each token (docs/ops.md, "Activations").

    Attributes:
        bits: 3, 4 or 8.
        clip: part of the largest |x| of a token that the grid covers.
    """

    bits: int
    clip: float = 1.0


@dataclass(frozen=True, eq=False)
class Kronecker:
    """An invertible matrix `left ⊗ right` of K = n1 n2 channels: `x (left ⊗ right)` is `leftᵀ X right` of X `[n1, n2]`.

    Attributes:
        left: float32 `[n1, n1]`.
        right: float32 `[n2, n2]`; None is the identity.
    """

    left: npt.NDArray[Any]
    right: npt.NDArray[Any] | None = None


@dataclass(frozen=True, eq=False)
class OnlineTransform:
    """What a linear applies to its inputs before it quantizes them: `Hadamard(x) * diagonal`, or `x (left ⊗ right)`.

    Attributes:
        hadamard_size: a power of two that divides K; 1 is none.
        interleave: equal runs of channels that take turns before the Hadamard transform: `[n, K/n]` transposed, so that
            a block has channels of all of them; 1 leaves channels where they are.
        diagonal: float32 `[K]`; None is 1.
        kronecker: in the place of the other two.
    """

    hadamard_size: int
    diagonal: npt.NDArray[Any] | None = None
    kronecker: Kronecker | None = None
    interleave: int = 1


@dataclass(frozen=True)
class KVQuantization:
    """The cache of one layer: asymmetric, one scale and zero point for each token and head (docs/ops.md, "One row").

    Attributes:
        key_bits: 3, 4 or 8.
        value_bits: 3, 4 or 8.
        key_clip: part of the range of a key head that the grid covers.
        value_clip: the same of values.
        hadamard: rotate query and key heads after RoPE.
    """

    key_bits: int
    value_bits: int
    key_clip: float = 1.0
    value_clip: float = 1.0
    hadamard: bool = False


@dataclass(frozen=True, eq=False)
class StaticKVQuantization:
    """The cache of one layer as GroupQueryAttention holds it: symmetric, a scale fixed at export for each channel.

    Keys count after RoPE. `code = clamp(round_half_even(x * (1 / scale)), -2^(bits-1), 2^(bits-1) - 1)`.

    Attributes:
        bits: 8 (int8), or 4 (uint8 of two codes plus 8, the lower channel in the lower half).
        key_scales: float32 `[kv_heads, head_dim]`, positive.
        value_scales: the same of values.
    """

    bits: int
    key_scales: npt.NDArray[Any]
    value_scales: npt.NDArray[Any]


AnyKVQuantization = KVQuantization | StaticKVQuantization
"""How the cache of a layer is quantized, by whichever operator."""
