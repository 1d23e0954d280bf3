"""What a machine can do at most: bytes read and 8-bit products a second; and what its caches hold."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bdq_runtime.library import library_info

COLD_CACHES = 4
LEAST_COLD_BYTES = 128 << 20
MOST_COLD_BYTES = 1 << 30

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_LOOP = Path(__file__).with_name("peak_int8.cc")


def selected_isa() -> str:
    """The instruction set that the library uses.

    Raises:
        LibraryError: there is no library.
    """
    return os.environ.get("BDQ_ISA") or library_info().isas[-1]


def last_cache_bytes(caches: Path = _CACHES) -> int:
    """Bytes of the last-level cache; 0 where the system does not say."""
    found = {}
    for index in caches.glob("index*"):
        try:
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 0)
        if level.isdecimal() and size[:-1].isdecimal():
            found[int(level)] = int(size[:-1]) * unit
    return found[max(found)] if found else 0


def cold_bytes(cache: int) -> int:
    """Bytes of which, read in turn, a cache of `cache` bytes keeps nothing. Bounded, since each contender has them."""
    return min(max(COLD_CACHES * cache, LEAST_COLD_BYTES), MOST_COLD_BYTES)


def reader(size: int, threads: int) -> Callable[[], object]:
    """A call that reads `size` bytes by a plain vector sum, a part in each thread.

    Integers of 64 bits, because NumPy adds those faster than memory brings them (float32 barely).
    """
    parts = np.array_split(np.ones(size // 8, np.int64), threads)
    if threads == 1:
        return lambda: parts[0].sum()
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(np.sum, parts))


class PeakLoop:
    """A loop of an instruction set's products on registers alone, compiled for the time of a `with`.

    Attributes:
        problem: why there is none; empty when there is.
    """

    def __init__(self, isa: str, compiler: str = "c++") -> None:
        self.problem = ""
        self._isa, self._compiler = isa, compiler
        self._folder = tempfile.TemporaryDirectory()
        self._program = Path(self._folder.name, "peak_int8")

    def __enter__(self) -> PeakLoop:
        try:
            command = [self._compiler, "-O2", str(_LOOP), "-o", str(self._program)]
            subprocess.run(command, capture_output=True, text=True, check=True)
            self.macs_per_second(1)
        except OSError as error:
            self.problem = str(error)
        except subprocess.CalledProcessError as error:
            lines = sorted(error.stderr.splitlines(), key=lambda line: "error" not in line)
            self.problem = lines[0] if lines else f"{error.cmd[0]} returned {error.returncode}"
        return self

    def __exit__(self, *exception: object) -> None:
        self._folder.cleanup()

    def macs_per_second(self, threads: int) -> float | None:
        """What `threads` processes reach together; None where there is a problem.

        Raises:
            subprocess.CalledProcessError: one of them failed.
        """
        if self.problem:
            return None
        command = [str(self._program), self._isa]
        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(
                lambda _: subprocess.run(command, capture_output=True, text=True, check=True), range(threads)
            )
            return sum(float(process.stdout) for process in done)
