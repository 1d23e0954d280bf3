"""How texts of a model begin: what its tokenizer puts first, and how a user's turn is opened."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from bdq_runtime.tokenizer import TextTokenizer

FREE = -1
"""Stands where the model chooses the token."""


@dataclass(frozen=True)
class Openings:
    """Tokens that sampled passages start with.

    Attributes:
        beginning: what the tokenizer puts before every text. A model that was trained with it writes nonsense without.
        chat: everything before the words of the user in a conversation; empty without a chat template.
        special: ids that are no words; they are not drawn as the first word of a passage.
    """

    beginning: tuple[int, ...] = ()
    chat: tuple[int, ...] = ()
    special: frozenset[int] = frozenset()

    @classmethod
    def of(cls, directory: Path) -> Openings:
        """The openings of the model in `directory`, by its tokenizer files."""
        tokenizer = TextTokenizer(directory)
        special = frozenset(tokenizer.backend.get_added_tokens_decoder())
        return cls(tuple(tokenizer.beginning()), _chat_opening(tokenizer), special)

    def draw(self, count: int, length: int, vocab_size: int, generator: torch.Generator) -> Tensor:
        """Fixed tokens `[count, length]` int64 of passages; `FREE` where the model goes on.

        Every second passage opens a conversation where the model knows how, or is the beginning alone; the others have
        a random word after the beginning, and so has everything where a beginning alone would be empty.
        """
        fixed = torch.full((count, length), FREE)
        ordinary = torch.ones(vocab_size, dtype=torch.bool)
        ordinary[[token for token in self.special if token < vocab_size]] = False
        words = ordinary.nonzero()[:, 0]
        drawn = words[torch.randint(0, len(words), (count,), generator=generator)]
        fixed[:, : len(self.beginning)] = torch.tensor(self.beginning, dtype=torch.int64)
        fixed[:, len(self.beginning)] = drawn
        other = self.chat if 0 < len(self.chat) < length // 2 else self.beginning
        if other:
            fixed[::2] = FREE
            fixed[::2, : len(other)] = torch.tensor(other, dtype=torch.int64)
        return fixed


def _chat_opening(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """What two conversations with different words have in common at their start."""
    template = tokenizer.template()
    if template is None or "strftime_now" in template:  # the same seed gives the same text on another day
        return ()
    try:
        one, other = (tokenizer.chat([{"role": "user", "content": words}]) for words in ("Why", "1"))
    except ValueError:  # a template may insist on a conversation of another form
        return ()
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
