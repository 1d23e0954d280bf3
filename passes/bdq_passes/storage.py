"""Where arrays that passes make are kept: in memory, unless whoever runs the passes has a better place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy.typing as npt

Array = npt.NDArray[Any]
Keep = Callable[[Array], Array]
"""Gives an array of the same values, dtype and shape, such as a view of a mapped file."""

_SMALL = 1 << 16
"""Bytes below which an array stays in memory."""
_KEEP: ContextVar[Keep | None] = ContextVar("keep", default=None)


@contextmanager
def kept_by(keep: Keep | None) -> Iterator[None]:
    """Let `keep` decide where large arrays lie that are added to graphs inside of the block; None leaves them."""
    token = _KEEP.set(keep)
    try:
        yield
    finally:
        _KEEP.reset(token)


def stored(array: Array) -> Array:
    """`array`, or the one that `keep` gives for it."""
    keep = _KEEP.get()
    return array if keep is None or array.nbytes < _SMALL else keep(array)
