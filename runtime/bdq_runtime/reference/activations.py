"""Dynamic symmetric quantization, one scale a token (docs/ops.md, "Activations"): exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.opset import ACTIVATION_BITS

Array = npt.NDArray[Any]

SMALLEST_SCALE = np.float32(1e-30)
"""What a row of zeros is divided by."""


def quantize_activations(x: Array, bits: int, clip: float = 1.0) -> tuple[Array, Array]:
    """Codes int8 `[..., K]` and scales float32 `[..., 1]` of rows `x [..., K]` float32.

    Raises:
        ValueError: bits that no operator has, or 16, which quantizes nothing.
    """
    if bits not in ACTIVATION_BITS or bits == 16:
        raise ValueError(f"activation bits are {bits}, expected 3, 4 or 8")
    x = np.asarray(x, np.float32)
    high = np.float32(2 ** (bits - 1) - 1)
    factor = np.float32(clip) / high
    scale = np.maximum(np.abs(x).max(-1, keepdims=True, initial=np.float32(0)) * factor, SMALLEST_SCALE)
    codes = np.clip(np.rint(x * (np.float32(1) / scale)), -high - np.float32(1), high)
    return codes.astype(np.int8), scale


def dynamic_fake_quantize(x: Array, bits: int, clip: float = 1.0) -> Array:
    """`x [..., K]` float32 as the nearest points of each row's grid; itself at 16 bits."""
    if bits == 16:
        return np.asarray(x, np.float32)
    codes, scale = quantize_activations(x, bits, clip)
    result: Array = codes.astype(np.float32) * scale
    return result
