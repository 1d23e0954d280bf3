"""What a compiled kernel is called: the function and its constants, so that an entry name says which image it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def image_name(function: str, constants: Mapping[str, Any]) -> str:
    """`low_bit_gemm`, `{"BITS": 4, "BM": 16}` -> `bdq_low_bit_gemm_bits4_bm16`."""
    parts = [f"{name.lower()}{int(value)}" for name, value in constants.items() if name != "ASM"]
    return "_".join([f"bdq_{function}", *parts])


def named(function: str) -> Callable[[Any], str]:
    """The `repr` of a kernel for `triton.jit`: its entry name."""
    return lambda specialization: image_name(function, specialization.constants)
