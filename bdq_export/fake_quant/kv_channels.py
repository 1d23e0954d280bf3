"""The cache that GroupQueryAttention quantizes by itself, bit for bit: one static scale for each channel."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def channel_steps(scales: npt.NDArray[Any]) -> Tensor:
    """Scales `[kv_heads, head_dim]` float32 as what heads `[..., kv_heads, tokens, head_dim]` are multiplied with."""
    return torch.from_numpy(scales)[:, None]


def fake_quantize_channels(x: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The values that keys or values `x` `[..., kv_heads, tokens, head_dim]` float32 have in the cache.

    ONNX Runtime multiplies with the reciprocal of a scale in float32 and rounds to even.

    Args:
        x: keys after RoPE, or values.
        steps: of `channel_steps`.
        bits: 4 or 8.
    """
    half = 1 << (bits - 1)
    return (x * (1.0 / steps)).round().clamp(-half, half - 1) * steps
