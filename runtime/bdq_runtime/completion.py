"""A prompt's completion as text, up to a stop text: what evaluation tasks ask for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from bdq_runtime.generate import pick
from bdq_runtime.prefix_reuse import PrefixReuse
from bdq_runtime.tokenizer import TextTokenizer


def complete(
    reuse: PrefixReuse,
    tokenizer: TextTokenizer,
    prompt: Sequence[int],
    count: int,
    stops: Collection[str],
    ends: Collection[int],
    temperature: float,
    random: np.random.Generator,
) -> str:
    """The text of at most `count` tokens after `prompt`, without special tokens; what follows a stop text is kept.

    Args:
        reuse: reads prompts; what this one shares with the last is not computed again.
        stops: texts; the first one to be complete ends the generation.
        ends: token ids that end it and are not part of the text.
        temperature: 0 takes the most likely token.

    Raises:
        ValueError: an empty prompt.
    """
    ids: list[int] = []
    text, stream = "", tokenizer.stream()
    for _ in range(count):
        sequence = (*prompt, *ids)
        *_, logits = reuse.read(sequence, len(sequence) - 1)
        token = pick(logits[-1], temperature, random)
        if token in ends:
            break
        ids.append(token)
        text += stream.push(token)
        if any(stop in text for stop in stops if stop):
            break
    return tokenizer.decode(ids)
