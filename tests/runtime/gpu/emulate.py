"""Run models on an emulated GPU: `python emulate.py LIBCUDA FOLDER CAPABILITY[:NAME] ...`.

ONNX Runtime calls the CUDA operators, they call the driver, and each launch runs the Triton kernel of the image that
was launched in the interpreter, with the launch's own grid and arguments. FOLDER holds `NAME.onnx` with `NAME.npz`,
all of which are run on a GPU of each compute capability, or only the one that is named. Outputs are written to
`NAME.CAPABILITY.out.npz`, or what went wrong to `NAME.CAPABILITY.error`; `report.json` says what was launched.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import os
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["BDQ_CUDA"] = "mock"

import numpy as np
import onnxruntime as ort

from bdq_runtime.gpu.archive import read_archive
from bdq_runtime.gpu.variants import IMAGES
from bdq_runtime.library import register

_INTEGERS = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
_POINTERS = {"fp32": "float32", "fp16": "float16", "i32": "int32", "i8": "int8", "u8": "uint8"}
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


def _runs_on(target: int, capability: int) -> bool:
    """PTX runs everywhere, machine code for 8.x on newer 8.x, other machine code on its own capability."""
    return target in (0, capability) or (target // 10 == capability // 10 == 8 and target < capability)


class Emulator:
    """What the mock driver calls. Keeps what was launched and what went wrong."""

    def __init__(self, capability: int, pointer: Any) -> None:
        self.pointer = pointer
        self.launches: Counter[str] = Counter()
        self.error = ""
        self.entries = [e for e in read_archive() if _runs_on(e.target, capability)]

    def launch(self, image: int, entry: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> int:
        """One launch; 719, the driver's "unspecified launch failure", when something is wrong."""
        try:
            self._run(image, entry.decode(), tuple(grid[:3]), tuple(block[:3]), shared, arguments)
        except BaseException:
            self.error = traceback.format_exc()
            return 719
        return 0

    def _run(
        self, image: int, name: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, arguments: Any
    ) -> None:
        # machine code goes before PTX, which has target 0
        chosen = max((e for e in self.entries if e.name == name), key=lambda e: e.target)
        assert ctypes.string_at(image, len(chosen.code)) == chosen.code, f"{name}: not the image for sm_{chosen.target}"
        assert block == (chosen.threads, 1, 1), f"{name}: block {block}, compiled for {chosen.threads}"
        assert shared == chosen.shared, f"{name}: {shared} bytes of shared memory, compiled for {chosen.shared}"
        variant = IMAGES[name]
        kinds = [kind for kind, _ in variant.arguments]
        values = [self._value(kind, arguments[i]) for i, kind in enumerate(kinds)]
        module, _, function = variant.kernel.partition(".")
        kernel = getattr(importlib.import_module(f"bdq_runtime.gpu.kernels.{module}"), function)
        constants = {key: 0 if key == "ASM" else value for key, value in variant.constants.items()}
        with np.errstate(over="ignore", invalid="ignore"):
            kernel[grid](*values, **constants)
        self.launches[f"{name} sm_{chosen.target}"] += 1

    def _value(self, kind: str, address: int) -> Any:
        if kind.startswith("*"):
            value = ctypes.c_uint64.from_address(address).value
            assert value % 16 == 0, "a pointer is not aligned"
            return self.pointer(value, _POINTERS[kind[1:]])
        return _INTEGERS[kind].from_address(address).value


def _run_model(path: Path, capability: int, emulator: Emulator) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    register(options)
    emulator.error = ""
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feeds = dict(np.load(path.with_suffix(".npz")))
        outputs = session.run(None, feeds)
    except Exception as error:
        path.with_suffix(f".{capability}.error").write_text(f"{error}\n{emulator.error}")
        return
    np.savez(
        path.with_suffix(f".{capability}.out.npz"),
        **{o.name: v for o, v in zip(session.get_outputs(), outputs, strict=True)},
    )


def main(library: str, folder: Path, runs: list[str]) -> None:
    """The command."""
    source = importlib.util.spec_from_file_location("conftest", Path(__file__).with_name("conftest.py"))
    assert source is not None
    assert source.loader is not None
    helpers = importlib.util.module_from_spec(source)
    source.loader.exec_module(helpers)
    mock = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)  # its soname is what the operators' dlopen finds
    launches = {}
    for run in runs:
        capability, _, name = run.partition(":")
        emulator = Emulator(int(capability), helpers.DevicePointer)
        callback = _LAUNCH(emulator.launch)
        mock.mock_set(callback, int(capability))
        for path in sorted(folder.glob(f"{name or '*'}.onnx")):
            _run_model(path, int(capability), emulator)
        launches[capability] = emulator.launches
    report = {"launches": launches, "context_depth": mock.mock_context_depth(), "loads": mock.mock_loads()}
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
