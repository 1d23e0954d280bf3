"""Transforms that flatten weights and activations, and folding them into the weights."""

from __future__ import annotations

from bdq_export.transform.closed_form import input_diagonal, smooth_diagonal
from bdq_export.transform.flatness import flatness
from bdq_export.transform.fold import fold, online_by_path
from bdq_export.transform.hadamard import random_hadamard
from bdq_export.transform.sinkhorn import equilibrate
from bdq_export.transform.transforms import Transforms, check_transforms

__all__ = [
    "Transforms",
    "check_transforms",
    "equilibrate",
    "flatness",
    "fold",
    "input_diagonal",
    "online_by_path",
    "random_hadamard",
    "smooth_diagonal",
]
