"""Opening an ONNX file in ONNX Runtime, with errors that say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from bdq_runtime.library import (
    LibraryMissingError,
    LibraryNotLoadableError,
    LibraryTooOldError,
    register_for,
    warn_slow,
)
from bdq_runtime.opset import DOMAIN
from bdq_runtime.opsets import opset_version

_TYPES = ("float32", "float16", "int8", "uint8", "int32", "int64")
_EXTERNAL = re.compile(r"External (?:initializer|data).*")


def create_session(
    path: str | Path,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    use_library: bool | None = None,
) -> ort.InferenceSession:
    """Open `path` in ONNX Runtime, with the kernels of the op library where the model has `bdq` operators.

    Args:
        path: an `.onnx` file; its external data lies beside it.
        threads: threads inside one operator; None lets ONNX Runtime choose (one per core).
        providers: execution providers in order of preference; None takes the CPU.
        use_library: None takes the library when it is there, loads and knows the model's operators, and says so once
            when not; True insists on it; False runs `bdq` operators as the functions of standard operators they carry.

    Raises:
        FileNotFoundError: no such file, or its data file is missing.
        ValueError: not an ONNX file, truncated data, a node ONNX Runtime does not know, or an unknown provider.
        LibraryError: `use_library=True` and the library is missing, does not load or is too old; or `BDQ_ISA` is no
            instruction set of this machine.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"model {file} does not exist; give an .onnx file")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty, expected an ONNX model; export it again")
    chosen = list(providers) if providers else ["CPUExecutionProvider"]
    missing = [p for p in chosen if p not in ort.get_available_providers()]
    if missing:
        raise ValueError(
            f"execution provider {missing[0]} is not available; this onnxruntime has "
            f"{', '.join(ort.get_available_providers())}"
        )
    options = _options(threads)
    if use_library is not False:
        _add_library(options, file, insist=bool(use_library))
    try:
        return ort.InferenceSession(str(file), options, providers=chosen)
    except Exception as error:  # onnxruntime raises classes of a private module, all of them derived from Exception
        raise _explained(file, str(error)) from None


def _options(threads: int | None) -> ort.SessionOptions:
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; ONNX Runtime would print it on top
    if threads is None:
        # ONNX Runtime ignores the usual variable; a user who set it means it.
        setting = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(setting) if setting.isdecimal() else 0
    options.intra_op_num_threads = threads
    return options


def _add_library(options: ort.SessionOptions, file: Path, insist: bool) -> None:
    version = opset_version(file, DOMAIN)
    if version is None:
        return
    try:
        register_for(options, version)
    except (LibraryMissingError, LibraryNotLoadableError, LibraryTooOldError) as error:
        if insist:
            raise
        warn_slow(str(error))


def _explained(file: Path, message: str) -> Exception:
    line = " ".join(message.split())
    if "protobuf" in line.lower():
        return ValueError(f"{file} is not an ONNX model (its protobuf does not parse); export it again")
    external = _EXTERNAL.search(line)
    if external and "does not exist" in external[0]:
        return FileNotFoundError(f"the data file of {file} is missing: {external[0]}; keep the two together")
    if external:
        return ValueError(f"the data file of {file} is truncated or of another model: {external[0]}")
    return ValueError(f"ONNX Runtime {ort.__version__} cannot open {file}: {line[:400]}")


def numpy_type(onnx_type: str) -> np.dtype[Any]:
    """The numpy dtype of an ONNX Runtime type string such as `tensor(float)`.

    Raises:
        ValueError: a type that a decoder's inputs and outputs do not have here.
    """
    name = onnx_type.removeprefix("tensor(").removesuffix(")")
    name = "float32" if name == "float" else name
    if name not in _TYPES:
        raise ValueError(f"type {onnx_type} is not supported, expected a tensor of one of {', '.join(_TYPES)}")
    return np.dtype(name)
