"""Huge pages for what every step reads.

A decode step reads all weights once, more 4 KiB pages than the processor remembers translations for. Linux gives
pages of 2 MiB to programs that ask for them, and ONNX Runtime does not ask; this module asks on its behalf, for memory
that is in use already. It changes no value and no amount of memory, only the speed of reading it.
"""

from __future__ import annotations

import ctypes
import logging
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

logger = logging.getLogger(__name__)

HUGE = 2 << 20
_PAGE = 4096
_ADVISE_HUGE, _COLLAPSE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE (Linux 6.1)
_PRIVATE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *(\[heap\])?")
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")


def use_huge_pages() -> int:
    """Move this process's large private memory to huge pages, as far as the system allows; bytes now in them.

    Takes about as long as copying that memory. Only pieces of 2 MiB that are wholly in use are moved. Without Linux,
    without /proc, or where the administrator switched huge pages off, nothing happens and the result is 0.
    """
    if sys.platform != "linux" or not _allowed():
        return 0
    try:
        regions = list(private_regions(_MAPS.read_text()))
    except OSError:
        return 0
    library = ctypes.CDLL(None)
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    moved = sum(_move(library, start, end) for start, end in regions)
    logger.debug("%d MiB are in huge pages", moved >> 20)
    return moved


def private_regions(maps: str) -> Iterator[tuple[int, int]]:
    """Address ranges of anonymous writable memory in the text of /proc/self/maps, cut to whole huge pages."""
    for line in maps.splitlines():
        found = _PRIVATE.fullmatch(line.rstrip())
        if found:
            start, end = -(-int(found[1], 16) // HUGE) * HUGE, int(found[2], 16) // HUGE * HUGE
            if start < end:
                yield start, end


def used_runs(resident: bytes) -> Iterator[tuple[int, int]]:
    """Runs of huge pages that are wholly in use, as (first, count).

    Args:
        resident: one byte for each small page, its lowest bit set where the page is in memory (as `mincore` writes).
    """
    small = HUGE // _PAGE
    full = [all(byte & 1 for byte in resident[i : i + small]) for i in range(0, len(resident), small)]
    first = 0
    for used, run in groupby(full):
        count = len(list(run))
        if used:
            yield first, count
        first += count


def _move(library: ctypes.CDLL, start: int, end: int) -> int:
    resident = ctypes.create_string_buffer((end - start) // _PAGE)
    # A region may have been unmapped by another thread since it was listed: each call then fails and moves nothing.
    if library.mincore(start, end - start, resident):
        return 0
    library.madvise(start, end - start, _ADVISE_HUGE)
    moved = 0
    for first, count in used_runs(resident.raw):
        if library.madvise(start + first * HUGE, count * HUGE, _COLLAPSE) == 0:
            moved += count * HUGE
    return moved


def _allowed() -> bool:
    try:
        return "[never]" not in _SETTING.read_text()
    except OSError:
        return False
