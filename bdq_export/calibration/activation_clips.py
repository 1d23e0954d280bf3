"""How much of the largest activation of a token a grid should cover: the largest single lever below 8 bits.

A grid that ends at the largest value spends its few levels on outliers. Each site gets the ratio with the least error
of its linears' outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.precision import fast_matmuls
from bdq_export.fake_quant import fake_quantize_tokens
from bdq_runtime.specs import ActivationQuantization

RATIOS = tuple(round(1.0 - 0.05 * step, 2) for step in range(12))
"""1.0 to 0.45."""
_TOKENS = 2048
_LEAST = 1e-12


def search_clip(
    inputs: Tensor, weight: Tensor, bits: int, ratios: tuple[float, ...] = RATIOS
) -> ActivationQuantization:
    """The clip ratio of least output error for a site.

    Each token counts by its relative error: the few with massive activations would decide alone otherwise.

    Args:
        inputs: `[tokens, K]` float32, online transforms applied.
        weight: `[N, K]`, all linears of the site.
        bits: of the activations.
        ratios: candidates.
    """
    rows = inputs[:: max(1, inputs.shape[0] // parallel.share(_TOKENS))].float()
    expected = row_energies(rows, weight).clamp_min(_LEAST)
    errors = [
        parallel.mean_of(row_energies(fake_quantize_tokens(rows, bits, ratio) - rows, weight) / expected)
        for ratio in ratios
    ]
    return ActivationQuantization(bits, ratios[min(range(len(ratios)), key=errors.__getitem__)])


def row_energies(rows: Tensor, weight: Tensor) -> Tensor:
    """`|x Wᵀ|²` of each row `[tokens]`."""
    with torch.inference_mode(), fast_matmuls():
        return (rows @ weight.t()).float().square().sum(-1)
