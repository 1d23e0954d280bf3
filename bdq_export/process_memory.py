"""How much memory this process holds, now and at its peak within a stretch of code."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

_INTERVAL_SECONDS = 0.05


def resident_bytes() -> int:
    """Resident memory now, mapped checkpoint pages included; 0 where the system does not tell."""
    try:
        import psutil
    except ImportError:  # a runtime-only installation has no psutil
        return 0
    return int(psutil.Process().memory_info().rss)


def anonymous_bytes() -> int:
    """Resident memory now without pages of files, which the system takes back when it needs them; 0 but on Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def lifetime_peak_bytes() -> int:
    """Highest resident memory since the process started; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def return_freed_memory() -> None:
    """Return freed memory to the system where the C library can (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def give_back_memory() -> None:
    """Free what only reference cycles hold, and return freed memory to the system: see `return_freed_memory`."""
    gc.collect()
    return_freed_memory()


@contextmanager
def collecting_new_objects_only() -> Iterator[None]:
    """What is there at the start is left out of garbage collections meanwhile.

    torch and transformers are 400 000 objects that each full collection would walk through (docs/measurements.md, "Cost
    of an export"), and there is one after each block. Nothing happens where the caller has frozen objects already.
    """
    if gc.get_freeze_count() > 0:
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class PeakMemory:
    """Highest resident memory between `__enter__` and `__exit__`, in `peak_bytes`.

    A thread samples it 20 times a second. Where the lifetime peak rose meanwhile, that exact figure is used
    instead, so the stage that sets the record of a run is never under-reported.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._lifetime_before = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        self._lifetime_before = lifetime_peak_bytes()
        self._sample()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._sample()
        lifetime = lifetime_peak_bytes()
        if lifetime > self._lifetime_before:
            self.peak_bytes = max(self.peak_bytes, lifetime)

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, resident_bytes())
