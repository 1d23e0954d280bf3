"""The native library with the kernels of the `bdq` operators: where it is, what it holds, how a session gets it.

Without it every exported model still runs: each node carries a function of standard operators. The library makes it
fast.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnxruntime as ort

_LOG = logging.getLogger(__name__)
_NAME = {"win32": "bdq_ops.dll", "darwin": "libbdq_ops.dylib"}.get(sys.platform, "libbdq_ops.so")
_REINSTALL = "reinstall bdq-export with a C++17 compiler at hand (docs/install.md)"


class LibraryError(RuntimeError):
    """The library is missing, cannot be loaded, or is too old for a model."""


class LibraryMissingError(LibraryError):
    """No library was built when the package was installed."""


class LibraryNotLoadableError(LibraryError):
    """The file is there, but for another system, or damaged."""


class LibraryTooOldError(LibraryError):
    """A model uses a newer version of the operators than the library has."""


@dataclass(frozen=True)
class LibraryInfo:
    """What the library says of itself.

    Attributes:
        version: of the operators (`bdq_runtime.opset.VERSION` when it was built).
        isas: instruction sets that it has kernels for and this processor can run, the plainest first.
        operators: name -> {"inputs", "outputs", "attributes"}, as in `bdq_runtime.opset`.
    """

    version: int
    isas: tuple[str, ...]
    operators: Mapping[str, Any]


def library_path() -> Path:
    """Where the library is; for `SessionOptions.register_custom_ops_library` or onnxruntime-genai.

    `BDQ_LIBRARY` names another build of it.

    Raises:
        LibraryMissingError: the package was installed without it.
    """
    if other := os.environ.get("BDQ_LIBRARY"):
        if not Path(other).is_file():
            raise LibraryMissingError(f"the op library {other}, which BDQ_LIBRARY names, does not exist")
        return Path(other)
    found = files("bdq_runtime").joinpath(_NAME)
    if not found.is_file():
        raise LibraryMissingError(f"the op library {found} is missing; {_REINSTALL}")
    return Path(str(found))


def library_info() -> LibraryInfo:
    """Load the library and ask it.

    Raises:
        LibraryMissingError: the package was installed without it.
        LibraryNotLoadableError: it does not load on this machine.
    """
    return _info(library_path())


def register(options: ort.SessionOptions) -> None:
    """Give sessions made from `options` the kernels. A second call changes nothing.

    `BDQ_ISA` forces an instruction set; so does, for these options only, the config entry `bdq.isa`.

    Raises:
        LibraryMissingError: the package was installed without the library.
        LibraryError: it does not load, or the instruction set is not supported here.
    """
    path = library_path()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # a class of a private module
        line = " ".join(str(error).split())
        raise LibraryError(f"the op library {path} cannot be used: {line}") from None


def register_for(options: ort.SessionOptions, version: int) -> None:
    """`register` for a model that uses `version` of the operators.

    Raises:
        LibraryNotLoadableError: it does not load on this machine.
        LibraryTooOldError: the library has an older one: it would compute something else, or nothing.
        LibraryError: as `register`.
    """
    found = library_info().version
    if found < version:
        raise LibraryTooOldError(
            f"the op library {library_path()} has version {found} of the bdq operators, the model uses version "
            f"{version}; upgrade bdq-export"
        )
    register(options)


@lru_cache
def warn_slow(reason: str) -> None:
    """Say, once for each reason, that a model runs on standard operators."""
    _LOG.warning("%s. The model runs on standard operators, which is slower", reason)


@lru_cache
def _info(path: Path) -> LibraryInfo:
    try:
        describe = ctypes.CDLL(str(path)).bdq_describe
    except (OSError, AttributeError) as error:
        raise LibraryNotLoadableError(f"the op library {path} does not load ({error}); {_REINSTALL}") from None
    describe.restype = ctypes.c_char_p
    found = json.loads(describe())
    return LibraryInfo(found["version"], tuple(found["isas"]), found["operators"])
