"""What the system does to a run: full disks, memory that runs out, signals that end it."""

from __future__ import annotations

import errno
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bdq_export.errors import BdqError, ResourceError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# numpy's `tofile` reports a short write in words, without an error number
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")
# torch and onnxruntime raise RuntimeError and classes of their own
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|not enough memory|failed to allocate memory|bad_?alloc", re.I)


@contextmanager
def resource_errors() -> Iterator[None]:
    """Turn a full disk and memory that runs out, whoever reports them, into a ResourceError."""
    try:
        yield
    except BdqError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise ResourceError(f"the disk is full ({error}); free some space, also for temporary files") from error
        if is_out_of_memory(error):
            raise ResourceError("out of memory; close other programs or use a smaller model") from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is the system's refusal to write more."""
    return any(
        isinstance(cause, OSError) and (cause.errno in _DISK_FULL or bool(_SHORT_WRITE.search(str(cause))))
        for cause in _causes(error)
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what caused it, says that memory could not be allocated."""
    return any(isinstance(cause, MemoryError) or _OUT_OF_MEMORY.search(str(cause)) for cause in _causes(error))


def errno_of(error: BaseException) -> int:
    """The first system error number in a chain of exceptions; 0 when there is none."""
    return next((cause.errno for cause in _causes(error) if isinstance(cause, OSError) and cause.errno), 0)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGHUP raise SystemExit, so that the clean-up runs as for Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread set handlers
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    names = ("SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
