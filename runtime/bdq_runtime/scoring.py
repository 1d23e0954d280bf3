"""What logits say of given tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def log_softmax(logits: Array) -> Array:
    """Float64 log-probabilities of `[rows, vocab]` logits."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    result: Array = values
    return result


def token_log_probabilities(log_probabilities: Array, targets: Array) -> Array:
    """`[rows]` float64: of each row of `[rows, vocab]` the entry of its target."""
    result: Array = log_probabilities[np.arange(len(targets)), targets]
    return result
