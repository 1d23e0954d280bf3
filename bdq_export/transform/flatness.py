"""How evenly the energy of a matrix is spread: the measure that the transforms minimise.

    p_ij = A_ij² / Σ A²        flatness = Σ p_ij ln(p_ij) + ln(mn) = KL(p ‖ uniform)

0 is perfectly flat (all entries of equal size), ln(mn) is a single non-zero entry. Outliers widen a
quantization step quadratically in this measure, so flatter is better to quantize.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flatness(matrix: Tensor) -> float:
    """Normalised flatness of `matrix` (any shape), >= 0 and unchanged by a factor; computed in float64.

    Raises:
        ValueError: `matrix` is empty, all zero, or has NaN or infinite entries.
    """
    size = matrix.numel()
    largest = matrix.abs().amax().item() if size else 0.0
    if largest == 0 or not math.isfinite(largest):
        raise ValueError(f"flatness of a matrix with {size} entries and largest {largest}, expected finite, not all 0")
    # Divided by the largest entry first: squares of tiny or huge matrices would leave the range of float64.
    energy = (matrix.to(torch.float64) / largest).square()
    total = energy.sum()
    # Σ p ln p = Σ e ln e / E - ln E, so that p itself is never formed; xlogy gives 0 · ln 0 = 0.
    entropy = torch.xlogy(energy, energy).sum() / total - total.log()
    return max(0.0, entropy.item() + math.log(size))
