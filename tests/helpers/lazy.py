"""Weights in memory behind the interface of lazy ones."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from torch import Tensor

from bdq_export.lazy_weights import LazyWeights
from bdq_export.scratch import Scratch


class Lazy(LazyWeights):
    """Gives copies, and notes the names that were read."""

    def __init__(self, weights: Mapping[str, Tensor], folder: Path | None = None) -> None:
        self.weights, self.read = dict(weights), list[str]()
        self._scratch = Scratch(folder or Path(tempfile.gettempdir()))

    @property
    def scratch(self) -> Scratch:
        return self._scratch

    @property
    def names(self) -> Collection[str]:
        return self.weights

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        found = self.weights[name].clone()
        self.read.append(name)
        return found
