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


def log_likelihood(logits: Array, targets: Array) -> tuple[float, bool]:
    """Sum of the log-probabilities of `targets` `[rows]`, and whether each is the largest of its row.

    Args:
        logits: float32 `[rows, vocab]`; the exponentials are taken in float32 and summed in float64.
    """
    largest = logits.max(axis=-1, keepdims=True)
    normalizers = np.log(np.exp(logits - largest).sum(axis=-1, dtype=np.float64))
    differences = logits[np.arange(len(targets)), targets].astype(np.float64) - largest[:, 0]
    return float((differences - normalizers).sum()), bool((logits.argmax(axis=-1) == targets).all())


def token_log_probabilities(log_probabilities: Array, targets: Array) -> Array:
    """`[rows]` float64: of each row of `[rows, vocab]` the entry of its target."""
    result: Array = log_probabilities[np.arange(len(targets)), targets]
    return result
