"""The op library that travels with a model of `bdq` operators, so that a program which only has the folder is fast."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class OpLibrary:
    """What is known of the library for one model.

    Attributes:
        operators: names of the `bdq` operators that the model uses, in alphabetical order.
        version: of the operators, which a library must have at least.
        path: of the library that is copied beside the model; None where there is none.
        reason: why there is none; empty where there is one.
    """

    operators: tuple[str, ...]
    version: int
    path: Path | None
    reason: str = ""

    @property
    def name(self) -> str | None:
        """File name of the library beside the model."""
        return None if self.path is None else self.path.name

    @property
    def platform(self) -> str:
        """What the library is built for, for example "linux-x86_64"."""
        return sysconfig.get_platform()


def find_op_library(operators: tuple[str, ...], version: int) -> OpLibrary | None:
    """The library for a model that uses `operators`; None for a model of stock operators.

    A library that is missing, does not load here or is too old is no error: every model runs without one.
    """
    from bdq_runtime.library import LibraryError, library_info, library_path

    if not operators:
        return None
    try:
        found = library_info().version
    except LibraryError as error:
        return OpLibrary(operators, version, None, str(error))
    if found < version:
        return OpLibrary(operators, version, None, f"it has version {found} of the operators, not {version}")
    return OpLibrary(operators, version, library_path())
