"""Arrays on the disk instead of in memory: written once, mapped, and gone with the last view of them.

Files have no name once they are open, so nothing is left behind however the process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_export.errors import InvalidInputError

Array = npt.NDArray[Any]

_REGION = 1 << 30
"""Bytes of a file at most, unless one array is larger: few files, each of which is freed with the arrays in it."""
_ALIGNMENT = 64


class Scratch:
    """Keeps arrays in files of `folder`, on the disk that is meant for them.

    Args:
        folder: must exist and be writable.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._map: mmap.mmap | None = None
        self._file = -1
        self._position = self._size = 0

    def keep(self, array: Array) -> Array:
        """The same values in the same order of axes in memory, mapped; `array` itself where it is that already.

        Raises:
            InvalidInputError: the folder cannot be written to.
            OSError: the disk is full.
        """
        if array.nbytes == 0 or is_mapped(array):
            return array
        if not array.flags.c_contiguous and array.flags.f_contiguous:
            return self.keep(array.T).T
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        start = -(-self._position // _ALIGNMENT) * _ALIGNMENT
        if self._map is None or start + raw.size > self._size:
            self._map = self._begin(max(_REGION, raw.size))
            start = 0
        # Written, not stored through the map: a full disk is then an error and no signal.
        done = 0
        os.lseek(self._file, start, os.SEEK_SET)  # Windows has no pwrite
        while done < raw.size:
            done += os.write(self._file, raw[done:].data)
        self._position = start + raw.size
        return np.frombuffer(self._map, array.dtype, array.size, start).reshape(array.shape)

    def _begin(self, size: int) -> mmap.mmap:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        try:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                self._file = os.dup(file.fileno())
        except PermissionError as error:
            raise InvalidInputError(
                f"{self._folder} cannot be written to ({error.strerror}); choose another OUT or change its permissions"
            ) from None
        os.ftruncate(self._file, size)
        self._position, self._size = 0, size
        return mmap.mmap(self._file, size)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)


def is_mapped(array: Array) -> bool:
    """Whether the values of `array` lie in a mapped file of a `Scratch`."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return isinstance(base, mmap.mmap)
