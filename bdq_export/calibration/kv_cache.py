"""A KV cache of transformers that is allocated once: the default one copies everything it holds for each new token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in buffers for `capacity` tokens; what it returns is a view of what was written."""

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._capacity = capacity
        self._length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states `[batch, heads, new, head_dim]` after those before; returns all of them."""
        if self._buffers is None:
            self.lazy_initialization(key_states, value_states)
            self._buffers = (self._buffer(key_states), self._buffer(value_states))
        past = self._length
        self._length = end = past + key_states.shape[-2]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, past:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values

    def _buffer(self, states: Tensor) -> Tensor:
        return states.new_empty(*states.shape[:2], self._capacity, states.shape[-1])


def preallocated_cache(config: PretrainedConfig, capacity: int) -> DynamicCache:
    """A cache for `capacity` tokens; layers with a sliding window keep transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
