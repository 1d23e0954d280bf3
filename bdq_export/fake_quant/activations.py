"""Dynamic, symmetric, per-token activations: docs/ops.md, "Activations", bit for bit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bdq_export.fake_quant.rounding import Rounding, nearest

LEAST_SCALE = 1e-30


def token_scales(x: Tensor, bits: int, clip: float | Tensor = 1.0) -> Tensor:
    """Step `[..., 1]` float32 of each row of `x` `[..., K]` float32."""
    factor = _factor(bits, clip)
    return (x.abs().amax(-1, keepdim=True) * factor).clamp_min(LEAST_SCALE)


def quantize_tokens(
    x: Tensor, bits: int, clip: float | Tensor = 1.0, rounding: Rounding = nearest
) -> tuple[Tensor, Tensor]:
    """Integers `[..., K]` (as float32) and steps `[..., 1]` of `x` `[..., K]` float32.

    Args:
        x: rows are tokens.
        bits: 3, 4 or 8.
        clip: part of the largest |x| of a row that the grid covers; a tensor where it is learned.
        rounding: see `rounding.py`.
    """
    scales = token_scales(x, bits, clip)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return rounding(x * (1.0 / scales)).clamp(low, high), scales


def fake_quantize_tokens(x: Tensor, bits: int, clip: float | Tensor = 1.0, rounding: Rounding = nearest) -> Tensor:
    """The values that the integers of `quantize_tokens` stand for."""
    codes, scales = quantize_tokens(x, bits, clip, rounding)
    return codes * scales


def _factor(bits: int, clip: float | Tensor) -> float | Tensor:
    top = (1 << (bits - 1)) - 1
    if isinstance(clip, Tensor):
        return clip.to(torch.float32) / top
    return float(np.float32(clip) / np.float32(top))
