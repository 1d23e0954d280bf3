"""Canonical weights that are made when they are read: a model larger than memory, one layer of it at a time.

Whoever is given one of these reads it as any mapping; what is made of it (`transform.fold`, `float_model`) is lazy in
turn. So the kind of mapping that an export starts from decides whether it holds all weights or those of one block.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping

from torch import Tensor

from bdq_export.scratch import Scratch
from bdq_models import Architecture


class LazyWeights(Mapping[str, Tensor]):
    """Canonical name -> tensor, of which only what was read last (and what lies outside of the layers) is kept."""

    @property
    @abstractmethod
    def scratch(self) -> Scratch:
        """Where what is made of the weights is put instead of into memory."""

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Of all weights, in order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, which is not read for it.

        Raises:
            KeyError: there is no such weight.
        """

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """The weight `name`.

        Raises:
            KeyError: there is no such weight.
        """

    def __contains__(self, name: object) -> bool:
        return name in self.names  # that of `Mapping` would make the weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class ChangedWeights(LazyWeights):
    """Lazy weights of which a few, which are held, are others.

    Args:
        weights: all of them.
        changes: tensors of the same shapes by some of the names.
    """

    def __init__(self, weights: LazyWeights, changes: Mapping[str, Tensor]) -> None:
        self._weights, self._changes = weights, dict(changes)

    @property
    def scratch(self) -> Scratch:
        """That of the weights."""
        return self._weights.scratch

    @property
    def names(self) -> Collection[str]:
        """Those of the weights."""
        return self._weights.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._weights.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        """The weight `name`, changed or not."""
        return self._changes[name] if name in self._changes else self._weights[name]


def changed(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`weights` with `changes` (of the same shapes) in their places; lazy where `weights` are."""
    return ChangedWeights(weights, changes) if isinstance(weights, LazyWeights) else {**weights, **changes}


def shape_of(weights: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """Shape of the weight `name`, which is not made for it."""
    return weights.shape(name) if isinstance(weights, LazyWeights) else tuple(weights[name].shape)


def layer_of(architecture: Architecture, name: str) -> int | None:
    """Index of the decoder layer that the weight or module `name` belongs to; None outside of the layers."""
    prefix = f"{architecture.layers}."
    if not name.startswith(prefix):
        return None
    index = name[len(prefix) :].partition(".")[0]
    return int(index) if index.isdecimal() else None
