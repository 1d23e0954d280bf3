"""Rounding of the fake quantizers: a parameter, so that a learned stage can pass one that gradients go through."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""To the nearest integer, half to even; gradients are up to the function."""


def nearest(values: Tensor) -> Tensor:
    """Half to even; the gradient is 0."""
    return torch.round(values)


def straight_through(values: Tensor) -> Tensor:
    """The same values as `nearest`, with the gradient of the identity."""
    return values + (torch.round(values) - values).detach()


def single(value: float) -> float:
    """`value` rounded to float32: what an attribute of a node holds."""
    return float(np.float32(value))
