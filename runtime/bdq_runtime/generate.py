"""Generation: greedy or sampled tokens, one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.model import LanguageModel


def generate_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] | None = None,
) -> Iterator[int]:
    """Yield the tokens that follow `prompt`, each as soon as it is known.

    Args:
        prompt: token ids, at least one; the model's cache is reset first.
        max_new_tokens: stop after so many.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
        seed: of the sampling; the same seed gives the same tokens.
        stop: token ids that end the text and are not yielded; None takes the model's own.

    Raises:
        ValueError: empty prompt, negative temperature, fewer than one new token, or a prompt that leaves no room in
            the model's context.
    """
    if not prompt:
        raise ValueError("the prompt has no tokens, expected at least one; give a text")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}, expected 0 (greedy) or more")
    if max_new_tokens < 1:
        raise ValueError(f"new tokens are {max_new_tokens}, expected at least 1")
    limit = model.context_length
    if limit is not None and len(prompt) >= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens and the model's context {limit}; give a shorter text")
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - len(prompt))
    ends = model.folder.eos_ids() if stop is None else stop
    return _tokens(model, prompt, room, temperature, np.random.default_rng(seed), ends)


def _tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    count: int,
    temperature: float,
    random: np.random.Generator,
    ends: Collection[int],
) -> Iterator[int]:
    model.reset(len(prompt) + count)
    feed: Sequence[int] = prompt
    for _ in range(count):
        token = pick(model.append(feed)[-1], temperature, random)
        if token in ends:
            return
        yield token
        feed = (token,)


def pick(logits: npt.NDArray[Any], temperature: float, random: np.random.Generator) -> int:
    """The next token after `logits` `[vocab]`: the largest at temperature 0, else a sample of the softmax."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64)
    # The largest is subtracted before the division: a tiny temperature then gives -inf, never inf - inf.
    weights = np.exp((scaled - scaled.max()) / temperature)
    cumulative = weights.cumsum()
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
