"""The KV cache of a session: written in place where the graph can, handed from step to step where it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

Array = npt.NDArray[Any]

_MIN_CAPACITY = 64
_ALIGNMENT = 64  # a cache line, and the widest vector load of the kernels


@dataclass(frozen=True)
class CacheTensor:
    """One input of the cache and the output that continues it.

    Attributes:
        past: input name.
        present: output name.
        heads: KV heads.
        channels: elements of one head and position, as stored.
        dtype: element type.
    """

    past: str
    present: str
    heads: int
    channels: int
    dtype: np.dtype[Any]

    def zeros(self, positions: int) -> Array:
        """`[1, heads, positions, channels]` zeros."""
        return aligned((1, self.heads, positions, self.channels), self.dtype)


class Cache(ABC):
    """What `LanguageModel` needs of a cache."""

    @abstractmethod
    def reset(self, capacity: int) -> None:
        """Forget every position; make room for `capacity`."""

    @abstractmethod
    def truncate(self, length: int) -> None:
        """Keep the first `length` positions."""

    @abstractmethod
    def copies(self, length: int, rows: int) -> dict[str, Array]:
        """The first `length` positions of every tensor, `rows` times: `[rows, heads, length, channels]` by name."""

    @abstractmethod
    def bind(self, length: int, total: int) -> None:
        """Bind inputs and outputs for a run that takes the cache from `length` to `total` positions."""

    @abstractmethod
    def collect(self, total: int) -> None:
        """Take over what the run wrote; the cache now has `total` positions."""


class SharedCache(Cache):
    """One buffer a tensor, bound as past and as present: a run appends in place and copies nothing.

    GroupQueryAttention allows it: the attention mask, not the shape of the past, tells it the length of the text.
    """

    def __init__(self, io: ort.IOBinding, tensors: tuple[CacheTensor, ...]) -> None:
        self._io = io
        self._tensors = tensors
        self._buffers: dict[str, Array] = {}
        self._capacity = 0

    def reset(self, capacity: int) -> None:
        self._reserve(0, capacity)

    def truncate(self, length: int) -> None:
        pass  # the attention mask says how much of the buffer counts

    def copies(self, length: int, rows: int) -> dict[str, Array]:
        return {name: np.repeat(buffer[:, :, :length], rows, axis=0) for name, buffer in self._buffers.items()}

    def bind(self, length: int, total: int) -> None:
        self._reserve(length, total)

    def collect(self, total: int) -> None:
        pass  # written in place

    def _reserve(self, length: int, capacity: int) -> None:
        if self._capacity and capacity <= self._capacity:
            return
        # Doubling keeps the copies of a growing text linear; pages that nobody writes take no memory.
        self._capacity = max(capacity, 2 * self._capacity if length else 0, _MIN_CAPACITY)
        for tensor in self._tensors:
            buffer = tensor.zeros(self._capacity)
            if length:
                buffer[:, :, :length] = self._buffers[tensor.past][:, :, :length]
            self._buffers[tensor.past] = buffer
            place = ("cpu", 0, tensor.dtype, buffer.shape, buffer.ctypes.data)
            self._io.bind_input(tensor.past, *place)
            self._io.bind_output(tensor.present, *place)


class ConcatenatedCache(Cache):
    """The outputs of a run are the inputs of the next; each run copies the whole cache."""

    def __init__(self, io: ort.IOBinding, tensors: tuple[CacheTensor, ...]) -> None:
        self._io = io
        self._tensors = tensors
        self._values: list[ort.OrtValue] = []
        for tensor in tensors:  # first of all outputs, so that `get_outputs` begins with them
            io.bind_output(tensor.present, "cpu")

    def reset(self, capacity: int) -> None:
        self._hold([tensor.zeros(0) for tensor in self._tensors])

    def truncate(self, length: int) -> None:
        self._hold([np.ascontiguousarray(value.numpy()[:, :, :length]) for value in self._values])

    def copies(self, length: int, rows: int) -> dict[str, Array]:
        held = zip(self._tensors, self._values, strict=True)
        return {tensor.past: np.repeat(value.numpy()[:, :, :length], rows, axis=0) for tensor, value in held}

    def bind(self, length: int, total: int) -> None:
        for tensor, value in zip(self._tensors, self._values, strict=True):
            self._io.bind_ortvalue_input(tensor.past, value)
            self._io.bind_output(tensor.present, "cpu")

    def collect(self, total: int) -> None:
        self._values = self._io.get_outputs()[: len(self._tensors)]
        found = self._values[0].shape()[2]
        if found != total:
            raise ValueError(f"{self._tensors[0].present} has {found} positions after a run, expected {total}")

    def _hold(self, arrays: list[Array]) -> None:
        self._values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays]


def accepts_shared_cache(
    session: ort.InferenceSession, tensors: tuple[CacheTensor, ...], inputs: Mapping[str, Array]
) -> bool:
    """Whether the graph writes into a past longer than the text: then present is as long as past, not one longer.

    Args:
        inputs: what the graph takes besides the cache, for one token.
    """
    options = ort.RunOptions()
    options.log_severity_level = 4
    feed = {**inputs, **{tensor.past: tensor.zeros(2) for tensor in tensors}}
    try:
        present = session.run([tensor.present for tensor in tensors], feed, options)
    except Exception:  # onnxruntime's own classes; a graph that concatenates may refuse the shapes
        return False
    return all(value.shape[2] == 2 for value in present)


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Zeros whose address is a multiple of 64 bytes; pages that are never touched take no memory."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    result: Array = raw[start : start + size].view(dtype).reshape(shape)
    return result
