"""Perplexity of a text, and how far the model is from a reference: KL divergence and top-1 agreement.

The text is cut into windows of `seq_len` tokens that do not overlap; each is read without the ones before it, and its
first token is not scored. A rest shorter than a window is dropped. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.model import LanguageModel
from bdq_runtime.scoring import log_softmax, token_log_probabilities

Array = npt.NDArray[Any]
Reference = Callable[[Array], Array]
"""Token ids `[seq_len]` to logits `[seq_len, vocab]`."""

_LOGITS_BYTES = 1 << 27  # a window's logits are computed in pieces of this size: 262,144 tokens of vocabulary fit too
_SCORED_ROWS = 64


@dataclass(frozen=True)
class PerplexityResult:
    """Quality of a model on a text.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of a token.
        windows: windows read.
        seq_len: tokens of a window.
        scored_tokens: tokens in the mean.
        reference_perplexity: of the reference on the same tokens; None without one.
        kl_divergence: mean KL(reference ‖ model) of a token's distribution, in nats; None without a reference.
        top1_agreement: share of positions where both have the same most likely token; None without a reference.
    """

    perplexity: float
    windows: int
    seq_len: int
    scored_tokens: int
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None


@dataclass
class _Sums:
    log_probability: float = 0.0
    reference_log_probability: float = 0.0
    kl: float = 0.0
    agree: int = 0
    tokens: int = 0

    def add(self, logits: Array, targets: Array, reference: Array | None) -> None:
        """Add rows: `[rows, vocab]` logits, `[rows]` targets, `[rows, vocab]` reference logits."""
        for i in range(0, len(targets), _SCORED_ROWS):
            part = slice(i, i + _SCORED_ROWS)
            ours = log_softmax(logits[part])
            self.log_probability += float(token_log_probabilities(ours, targets[part]).sum())
            self.tokens += len(ours)
            if reference is not None:
                theirs = log_softmax(reference[part])
                self.reference_log_probability += float(token_log_probabilities(theirs, targets[part]).sum())
                self.agree += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                self.kl += float((np.exp(theirs) * (theirs - ours)).sum())


def windows_of(
    tokens: Sequence[int] | Array, seq_len: int, max_windows: int | None = None, beginning: Sequence[int] = ()
) -> Array:
    """Cut `tokens` into `[windows, seq_len]`.

    Args:
        beginning: token ids the model expects before every text; each window starts with them, inside `seq_len`.

    Raises:
        ValueError: `seq_len` is too small, `max_windows` is below 1, or the text is shorter than one window.
    """
    step = seq_len - len(beginning)
    if seq_len < 2 or step < 1:
        raise ValueError(f"sequence length is {seq_len}, expected at least {2 + len(beginning)}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"windows are limited to {max_windows}, expected at least 1")
    count = len(tokens) // step
    if count == 0:
        raise ValueError(f"the text has {len(tokens)} tokens, less than one window of {seq_len}; give more text")
    count = count if max_windows is None else min(count, max_windows)
    body = np.asarray(tokens[: count * step], np.int64).reshape(count, step)
    first = np.broadcast_to(np.asarray(beginning, np.int64), (count, len(beginning)))
    result: Array = np.concatenate([first, body], axis=1)
    return result


def measure_perplexity(
    model: LanguageModel,
    windows: Array,
    reference: Reference | None = None,
    on_window: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Read `windows` `[windows, seq_len]`, as `windows_of` cuts them.

    Args:
        reference: another model to compare with.
        on_window: called with the number of windows done.

    Raises:
        ValueError: logits of the reference that do not fit.
    """
    sums = _Sums()
    for done, window in enumerate(windows, 1):
        expected = None if reference is None else reference(window)
        if expected is not None and expected.shape != (len(window), model.vocab_size):
            raise ValueError(f"reference logits are {expected.shape}, expected {(len(window), model.vocab_size)}")
        for start, logits in _logits_of(model, window):
            end = start + len(logits)
            sums.add(logits, window[start + 1 : end + 1], None if expected is None else expected[start:end])
        if on_window is not None:
            on_window(done)
    mean = -sums.log_probability / sums.tokens
    result = PerplexityResult(_exp(mean), len(windows), windows.shape[1], sums.tokens)
    if reference is None:
        return result
    return PerplexityResult(
        *(result.perplexity, result.windows, result.seq_len, result.scored_tokens),
        reference_perplexity=_exp(-sums.reference_log_probability / sums.tokens),
        kl_divergence=sums.kl / sums.tokens,
        top1_agreement=sums.agree / sums.tokens,
    )


def _logits_of(model: LanguageModel, window: Array) -> Iterator[tuple[int, Array]]:
    """Logits of all positions of a window but the last, in pieces, each with the position of its first row."""
    rows = max(_SCORED_ROWS, _LOGITS_BYTES // (4 * model.vocab_size))
    model.reset(len(window))
    for start in range(0, len(window) - 1, rows):
        yield start, model.append(window[start : min(start + rows, len(window) - 1)], all_logits=True)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
