"""Diagonals in closed form, from the energies or the largest entries on the two sides of an edge.

A diagonal λ multiplies activation channel i and divides column i of the weights: `x Wᵀ = (xΛ)(WΛ⁻¹)ᵀ`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOOR = 1e-12
"""A channel whose statistic is below this part of the largest one is dead: it keeps λ = 1."""


def input_diagonal(weight_energy: Tensor, activation_energy: Tensor) -> Tensor:
    """λ_i = (Σ_j W_ji² / E[x_i²])^¼, scaled to geometric mean 1.

    Minimises `E‖xΛ‖² · ‖WΛ⁻¹‖²` (both factors are sums over channels; Cauchy-Schwarz is tight where
    `λ_i² E[x_i²]` and `λ_i⁻² Σ_j W_ji²` are proportional). Channels dead on either side get λ = 1.

    Args:
        weight_energy: Σ_j W_ji² of each channel `[K]`.
        activation_energy: E[x_i²] of each channel `[K]`, up to a common factor.

    Returns:
        float64 `[K]`.

    Raises:
        ValueError: different or empty shapes, negative or non-finite entries.
    """
    return _balance(weight_energy, activation_energy, exponent=0.25, weight_exponent=0.25)


def smooth_diagonal(weight_absmax: Tensor, activation_absmax: Tensor, alpha: float = 0.5) -> Tensor:
    """SmoothQuant's λ_i = max|W_i|^(1-α) / max|x_i|^α, scaled to geometric mean 1; float64 `[K]`.

    Args:
        weight_absmax: largest |W_ji| of each channel `[K]`.
        activation_absmax: largest |x_i| of each channel `[K]`.
        alpha: how much of the difficulty moves into the weights; 0 moves weight outliers only.

    Raises:
        ValueError: alpha outside 0..1, different or empty shapes, negative or non-finite entries.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, expected 0 to 1")
    return _balance(weight_absmax, activation_absmax, exponent=alpha, weight_exponent=1 - alpha)


def _balance(weight: Tensor, activation: Tensor, exponent: float, weight_exponent: float) -> Tensor:
    weight, activation = weight.to(torch.float64), activation.to(torch.float64)
    if weight.dim() != 1 or weight.shape != activation.shape or not weight.numel():
        raise ValueError(
            f"statistics have shapes {tuple(weight.shape)} and {tuple(activation.shape)}, expected two equal [K]"
        )
    for name, values in (("weight", weight), ("activation", activation)):
        smallest, largest = values.amin().item(), values.amax().item()
        if not (math.isfinite(smallest) and math.isfinite(largest) and smallest >= 0):
            raise ValueError(f"{name} statistics range from {smallest} to {largest}, expected finite and >= 0")
    live = (weight > weight.amax() * FLOOR) & (activation > activation.amax() * FLOOR)
    if not bool(live.any()):
        return torch.ones_like(weight)
    log = weight_exponent * weight.clamp_min(1e-300).log() - exponent * activation.clamp_min(1e-300).log()
    return torch.where(live, (log - log[live].mean()).exp(), 1.0)
