"""Triton kernels on the CPU: the interpreter with NumPy arrays as device memory."""

from __future__ import annotations

import ctypes
import importlib
import mmap
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
_LIBC = ctypes.CDLL(None)


class _Type:
    """What the interpreter wants to know of an element type: torch's name of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __str__(self) -> str:
        return f"torch.{self.name}"

    def __hash__(self) -> int:
        return hash(self.name)

    def __eq__(self, other: object) -> bool:
        return str(self) == str(other)


class DevicePointer:
    """An address with an element type, in the shape of the torch tensor that the interpreter expects."""

    def __init__(self, address: int, dtype: str) -> None:
        self.address, self.dtype = address, _Type(dtype)

    def data_ptr(self) -> int:
        return self.address

    def untyped_storage(self) -> DevicePointer:
        return self

    def cpu(self) -> DevicePointer:
        return self

    def copy_(self, other: DevicePointer) -> None:
        assert other.address == self.address

    def new_empty(self, *_: Any, **__: Any) -> DevicePointer:
        return DevicePointer(self.address, self.dtype.name)

    def set_(self, storage: DevicePointer, *_: Any) -> None:
        self.address = storage.address

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return ()

    def stride(self) -> tuple[int, ...]:
        return ()


class GuardedCopy:
    """A copy of an array whose last byte is the last of a page, before and after which nothing may be touched."""

    def __init__(self, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.array = array
        self.pages = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.pages + 2 * mmap.PAGESIZE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.address = first + mmap.PAGESIZE + self.pages - array.nbytes
        for guard in (first, first + mmap.PAGESIZE + self.pages):
            assert _LIBC.mprotect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) == 0
        ctypes.memmove(self.address, array.ctypes.data, array.nbytes)

    def pointer(self) -> DevicePointer:
        """What a kernel gets."""
        return DevicePointer(self.address, str(self.array.dtype))

    def copy_back(self) -> None:
        """What the kernel wrote, to the array."""
        ctypes.memmove(self.array.ctypes.data, self.address, self.array.nbytes)


@pytest.fixture(scope="session")
def interpreted() -> Callable[[str], ModuleType]:
    """Import a module of `bdq_runtime.gpu.kernels` whose kernels the interpreter runs: `interpreted("rows")`."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (pip install 'bdq-export[gpu-build]')")
    assert not isinstance(triton.language.max, triton.JITFunction), (
        "triton was imported before TRITON_INTERPRET was set"
    )
    return lambda name: importlib.import_module(f"bdq_runtime.gpu.kernels.{name}")


@pytest.fixture(scope="session")
def launch(interpreted: Callable[[str], ModuleType]) -> Callable[..., None]:
    """Run a kernel: `launch("rows.quantize_rows", grid, *arguments, **constants)`; arrays are device memory.

    A kernel that touches memory beside its arrays ends the process.
    """

    def run(kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        module, _, name = kernel.partition(".")
        function = getattr(interpreted(module), name)
        copies = {id(value): GuardedCopy(value) for value in arguments if isinstance(value, np.ndarray)}
        values = [copies[id(value)].pointer() if id(value) in copies else value for value in arguments]
        with np.errstate(over="ignore", invalid="ignore"):  # in lanes whose results nobody stores
            function[grid](*values, **constants)
        for copy in copies.values():
            copy.copy_back()

    return run


@pytest.fixture(scope="session")
def device_pointer() -> type[DevicePointer]:
    """`device_pointer(address, dtype)`: memory that somebody else allocated."""
    return DevicePointer
