"""How evenly the energy of a matrix is spread: the measure that the transforms minimise.

    p_ij = A_ij² / Σ A²        flatness = Σ p_ij ln(p_ij) + ln(mn) = KL(p ‖ uniform)

0 is perfectly flat (all entries of equal size), ln(mn) is a single non-zero entry. Outliers widen a
quantization step quadratically in this measure, so flatter is better to quantize.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SLAB = 1 << 20
"""Entries that are in float64 at a time."""


def flatness(matrix: Tensor) -> float:
    """Normalised flatness of `matrix` (any shape), >= 0 and unchanged by a factor; computed in float64.

    Raises:
        ValueError: `matrix` is empty, all zero, or has NaN or infinite entries.
    """
    size = matrix.numel()
    largest = matrix.abs().amax().item() if size else 0.0
    if largest == 0 or not math.isfinite(largest):
        raise ValueError(f"flatness of a matrix with {size} entries and largest {largest}, expected finite, not all 0")
    total = weighted = 0.0
    entries = matrix.reshape(-1)
    for start in range(0, size, SLAB):
        # Divided by the largest entry first: squares of tiny or huge matrices would leave the range of float64.
        energy = (entries[start : start + SLAB].to(torch.float64) / largest).square()
        total += energy.sum().item()
        weighted += torch.xlogy(energy, energy).sum().item()  # 0 · ln 0 = 0
    # Σ p ln p = Σ e ln e / E - ln E with p = e / E.
    return max(0.0, weighted / total - math.log(total) + math.log(size))
