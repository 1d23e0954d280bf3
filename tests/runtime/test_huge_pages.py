"""Only whole huge pages of private memory that is in use are moved, and their contents stay."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from bdq_runtime import huge_pages
from bdq_runtime.huge_pages import HUGE, private_regions, use_huge_pages, used_runs

MAPS = """\
55e000000000-55e000400000 r--p 00000000 fd:00 123                        /usr/bin/python3
55e000400000-55e000c00000 rw-p 00400000 fd:00 123                        /usr/bin/python3
55e001100000-55e001900000 rw-p 00000000 00:00 0                          [heap]
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
7f0000a00000-7f0000bff000 rw-p 00000000 00:00 0
7f0001000000-7f0001800000 rw-s 00000000 00:00 0
7f0002000000-7f0002800000 ---p 00000000 00:00 0
7ffd00000000-7ffd00800000 rw-p 00000000 00:00 0                          [stack]
"""


def test_regions_are_private_writable_and_whole() -> None:
    assert list(private_regions(MAPS)) == [(0x55E001200000, 0x55E001800000), (0x7F0000000000, 0x7F0000800000)]


def test_runs_hold_no_page_that_is_not_in_use() -> None:
    small = HUGE // 4096
    resident = bytearray(b"\x01" * (6 * small))
    resident[2 * small + 17] = 0
    resident[5 * small] = 0xFE  # the other bits mean nothing
    assert list(used_runs(bytes(resident))) == [(0, 2), (3, 2)]
    assert list(used_runs(bytes(small))) == []


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_memory_is_moved_and_keeps_its_contents() -> None:
    if not huge_pages._allowed():
        pytest.skip("the system gives no huge pages")
    count = 5
    block = mmap.mmap(-1, (count + 1) * HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(block, np.uint64)
    values[:] = np.random.default_rng(0).integers(0, 2**63, values.size)
    expected, before = values.copy(), _huge_bytes(values.ctypes.data)
    moved = use_huge_pages()
    assert np.array_equal(values, expected)
    if moved == 0:
        pytest.skip("this kernel moves no pages on demand")
    assert _huge_bytes(values.ctypes.data) - before >= (count - 1) * HUGE


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_never_means_never(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "_SETTING", setting)
    assert use_huge_pages() == 0


def _huge_bytes(address: int) -> int:
    """Bytes in huge pages of the mapping that holds `address`."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if header:
            inside = int(header[1], 16) <= address + HUGE < int(header[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            total += int(line.split()[1]) * 1024
    return total
