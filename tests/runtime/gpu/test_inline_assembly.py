"""The inline assembly that the interpreter cannot run, executed here: it equals the plain code that stands for it."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from bdq_runtime.gpu.archive import read_archive


def _execute(assembly: str, word: np.uint32) -> np.uint32:
    """A block of `shr.u32`, `mov.b32` and `and.b32` on 32-bit registers; $1 goes in, $0 comes out."""
    registers = {"$1": int(word)}
    body = assembly.strip().removeprefix("{").removesuffix("}")
    for line in filter(None, (part.strip() for part in body.split(";"))):
        if line.startswith(".reg .b32"):
            continue
        operation, target, *operands = re.split(r"[ ,]+", line)
        values = [registers[o] if o in registers else int(o, 0) for o in operands]
        if operation == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif operation == "and.b32":
            registers[target] = values[0] & values[1]
        else:
            assert operation == "mov.b32", operation
            registers[target] = values[0]
    return np.uint32(registers["$0"])


@pytest.mark.parametrize(
    ("shift", "mask"),
    [(0, 15), (4, 15), (0, 3), (2, 3), (4, 3), (6, 3), (0, 1), (1, 1), *((bit - 2, 4) for bit in range(2, 8))],
)
def test_four_bytes_at_once_are_four_times_one(interpreted: Callable[[str], ModuleType], shift: int, mask: int) -> None:
    assembly = interpreted("panels")._field_asm
    text = getattr(assembly, "fn", assembly)(shift, mask)
    words = np.random.default_rng(shift).integers(0, 1 << 32, 50, dtype=np.uint32)
    found = np.array([_execute(text, word) for word in words], np.uint32)
    bytes_ = words.view(np.uint8)
    np.testing.assert_array_equal(found.view(np.uint8), (bytes_ >> np.uint8(shift)) & np.uint8(mask))


def test_images_use_it() -> None:
    for entry in read_archive():
        if entry.target == 0 and "low_bit_gemv" in entry.name:
            assert b"dp4a.u32.s32" in entry.code, entry.name
        if entry.target == 0 and "low_bit_gemm_bits4" in entry.name:
            assert b"0x0f0f0f0f" in entry.code, entry.name
