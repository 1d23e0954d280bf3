"""Texts read one after the other: what a text shares with the one before is not computed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.model import LanguageModel

Array = npt.NDArray[Any]

LOGITS_BYTES = 1 << 26
"""About so many bytes of logits are held at a time."""


class PrefixReuse:
    """Reads whole token sequences; runs the model on the tokens beyond the prefix shared with the last sequence.

    A decoder's logits at a position depend on the tokens up to it, so this changes the order of sums only. Nothing else
    may use the model between two calls.

    Attributes:
        tokens: what is in the model's cache.
    """

    def __init__(self, model: LanguageModel, capacity: int = 0) -> None:
        """Empty the cache of `model` and make room for `capacity` tokens."""
        self._model = model
        self._step = max(1, LOGITS_BYTES // (4 * model.vocab_size))
        model.reset(capacity)
        self.tokens: tuple[int, ...] = ()
        self._rows = self._no_rows = np.zeros((0, model.vocab_size), np.float32)

    def read(self, sequence: Sequence[int], start: int) -> Iterator[Array]:
        """Yield float32 `[rows, vocab]` pieces of the logits after each token of `sequence` from position `start` on.

        Raises:
            ValueError: `start` is no position of `sequence`, or a token is outside the vocabulary.
        """
        if not 0 <= start < len(sequence):
            raise ValueError(f"position {start} is none of {len(sequence)} tokens")
        first = len(self.tokens) - len(self._rows)  # position of the first row held
        shared = common_prefix(self.tokens, sequence)
        if start < first:
            shared = min(shared, start)
        rows = self._rows[start - first : shared - first] if shared > start else self._no_rows
        self._model.truncate(shared)
        self.tokens, self._rows = tuple(sequence[:shared]), rows
        if len(rows):
            yield rows
        while shared < len(sequence):
            wanted = max(shared, start)
            end = min(len(sequence), wanted + self._step)
            piece = self._model.append(sequence[shared:end], last=end - wanted).astype(np.float32)
            # Pieces are held while they fit: the next sequence may share them.
            fits = len(self._rows) + len(piece) <= self._step
            self.tokens = tuple(sequence[:end])
            self._rows = np.concatenate([self._rows, piece]) if fits and len(self._rows) else piece
            shared = end
            yield piece

    def hold(self, sequence: Sequence[int]) -> None:
        """Bring the cache to `sequence`; no logits are wanted."""
        shared = common_prefix(self.tokens, sequence)
        self._model.truncate(shared)
        self._rows = self._no_rows
        self.tokens = tuple(sequence[:shared])
        if shared < len(sequence):
            self._model.append(sequence[shared:])
            self.tokens = tuple(sequence)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    for position, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return position
    return min(len(a), len(b))
