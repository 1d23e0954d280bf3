"""What a cubin needs and what it is made of, read by the disassembler that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_TENSOR = re.compile(r"\b(IMMA|IGMMA|UTCIMMA|HMMA|HGMMA|UTCHMMA|IDP)\b")


@dataclass(frozen=True)
class Resources:
    """Of one cubin.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread in local memory; what does not fit in registers.
        instructions: names of those that do matrix products or products of four bytes.
    """

    registers: int
    stack: int
    instructions: tuple[str, ...]


def resources(cubin: bytes) -> Resources:
    """Disassemble.

    Raises:
        RuntimeError: no cubin with one kernel.
    """
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "image.cubin"
        file.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "-res-usage", file)
        code = _output(tools / "nvdisasm", "-c", file)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump reports {len(found)} kernels, expected 1: {usage[:200]}")
    return Resources(int(found[0][0]), int(found[0][1]), tuple(sorted(set(_TENSOR.findall(code)))))


def _output(*command: Path | str) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
