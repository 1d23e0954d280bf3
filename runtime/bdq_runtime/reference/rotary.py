"""Rotary position embedding, halves (docs/ops.md, "Quantized-KV attention", step 1): exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def rotate_halves(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the first `2 h` channels of `x [..., D]` by `cos`, `sin` `[..., h]`, all float32; the rest stays.

    Raises:
        ValueError: more channels to turn than there are.
    """
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"cos_cache turns {2 * half} channels of a head of {x.shape[-1]}")
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return np.concatenate([*turned, x[..., 2 * half :]], axis=-1)
