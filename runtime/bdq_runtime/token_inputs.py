"""What a decoder takes besides its cache: token ids, attention mask, positions, how many logits to keep."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]

NAMES = ("input_ids", "attention_mask", "position_ids")
KEEP = "logits_to_keep"
_INT64 = np.dtype(np.int64)


class TokenInputs:
    """Binds the tokens of a run by address; a decode step binds only what changed.

    Attributes:
        token: int64 `[1, 1]`, the ids of a decode step; write into it and hand it to `bind`.
    """

    def __init__(self, io: ort.IOBinding, inputs: Collection[str], keeps: bool) -> None:
        """Bind to `io`.

        Args:
            inputs: names the graph has.
            keeps: the graph takes `logits_to_keep`.
        """
        self._io = io
        self._mask = NAMES[1] in inputs
        self._positions = NAMES[2] in inputs
        self._keeps = keeps
        self.token: Array = np.zeros((1, 1), np.int64)
        self._token_address = self.token.ctypes.data
        self._keep = np.zeros((), np.int64)
        self._bound: dict[str, tuple[int, tuple[int, ...]]] = {}
        self._grow(256)

    def bind(self, ids: Array, start: int, total: int, keep: int) -> None:
        """Bind a run of `ids` int64 `[1, total - start]` at positions `start` to `total`.

        `ids` must live until the run is over. `keep` of the last positions' logits are wanted, 0 for all.
        """
        if total > self._ones.shape[1]:
            self._grow(2 * total)
        self._place(NAMES[0], self._token_address if ids is self.token else ids.ctypes.data, ids.shape)
        if self._mask:
            self._place(NAMES[1], self._ones_address, (1, total))
        if self._positions:
            self._place(NAMES[2], self._range_address + _INT64.itemsize * start, (1, total - start))
        if self._keeps:
            self._keep[...] = keep
            self._place(KEEP, self._keep.ctypes.data, ())

    def values(self, ids: Array, start: int) -> dict[str, Array]:
        """What a run of rows `ids` int64 `[rows, count]` takes, all of them after `start` tokens; all logits."""
        rows, count = ids.shape
        values = {NAMES[0]: ids}
        if self._mask:
            values[NAMES[1]] = np.ones((rows, start + count), np.int64)
        if self._positions:
            values[NAMES[2]] = np.tile(np.arange(start, start + count), (rows, 1))
        if self._keeps:
            values[KEEP] = np.zeros((), np.int64)
        return values

    def one_token(self) -> dict[str, Array]:
        """Values of a run of one token, for the inputs the graph has."""
        values = {NAMES[0]: self.token}
        if self._mask:
            values[NAMES[1]] = np.ones((1, 1), np.int64)
        if self._positions:
            values[NAMES[2]] = np.zeros((1, 1), np.int64)
        return values

    def _place(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        place = (address, shape)
        if self._bound.get(name) != place:
            self._io.bind_input(name, "cpu", 0, _INT64, shape, address)
            self._bound[name] = place

    def _grow(self, size: int) -> None:
        # Addresses are taken once: asking numpy for one costs as much as the binding.
        self._ones = np.ones((1, size), np.int64)
        self._range = np.arange(size, dtype=np.int64)[None]
        self._ones_address, self._range_address = self._ones.ctypes.data, self._range.ctypes.data
