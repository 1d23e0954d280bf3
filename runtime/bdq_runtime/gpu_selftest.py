"""Test the CUDA kernels on this machine's GPU: `python -m bdq_runtime.gpu_selftest`.

Each operator runs on CUDAExecutionProvider and is compared with the NumPy reference, whose numbers the function bodies
in exported files have too. The kernels were compiled and emulated by those who wrote them, never run: that is why they
are off unless BDQ_CUDA=1 is set, and why this test comes first (docs/gpu.md).

Exit codes: 0 everything agrees, 1 something does not, 2 there is nothing to test.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from bdq_runtime.gpu.cases import CASES, Case, large_cases
from bdq_runtime.library import LibraryError, register
from bdq_runtime.opset import OPERATORS

Array = npt.NDArray[Any]
Run = Callable[[Case], list[Array]]

PROVIDER = "CUDAExecutionProvider"
TOLERANCE = 1e-4
"""Largest error of what is not exact, in parts of the largest output: sums of tensor cores, exp of the GPU."""


def run_on_gpu(case: Case) -> list[Array]:
    """The outputs of one node; an error if it would not run on the GPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    register(options)
    session = ort.InferenceSession(case.model(), options, providers=[PROVIDER])
    outputs: list[Array] = session.run(None, case.feeds())
    return outputs


def compare(case: Case, found: list[Array], tolerance: float = TOLERANCE) -> tuple[bool, str]:
    """Whether outputs are right, and how far off they are in words."""
    words, right = [], True
    kinds = OPERATORS[case.operator].outputs.values()
    for kind, value, wanted in zip(kinds, found, case.expected(), strict=True):
        if value.shape != wanted.shape:
            return False, f"shape {value.shape}, expected {wanted.shape}"
        if case.exact or kind == "uint8":
            wrong = int((value != wanted).sum())
            right &= wrong == 0
            words.append("exact" if wrong == 0 else f"{wrong} of {wanted.size} differ")
        else:
            error = float(np.abs(value - wanted).max() / np.abs(wanted).max())
            right &= error <= tolerance  # false for NaN
            words.append(f"error {error:.1e}")
    return right, ", ".join(words)


def run_cases(cases: Mapping[str, Case], run: Run, tolerance: float = TOLERANCE) -> int:
    """Print a line for each case; the number of those that are wrong."""
    failures = 0
    for name, case in cases.items():
        try:
            right, words = compare(case, run(case), tolerance)
        except Exception as error:  # onnxruntime raises classes of a private module
            right, words = False, " ".join(str(error).split())[:300]
        failures += not right
        print(f"{'ok  ' if right else 'FAIL'}  {case.operator:32} {name:34} {words}", flush=True)
    return failures


def obstacle() -> str | None:
    """Why the kernels cannot be tested here, or None."""
    available = ort.get_available_providers()
    if PROVIDER not in available:
        return (
            f"onnxruntime {ort.__version__} here has {', '.join(available)}, but no {PROVIDER}: "
            "install onnxruntime-gpu instead (docs/install.md)"
        )
    try:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(CASES["hadamard"].model(), _registered(options), providers=[PROVIDER])
    except LibraryError as error:
        return str(error)
    except Exception as error:
        return f"no session on the GPU: {' '.join(str(error).split())[:300]}"
    if PROVIDER not in session.get_providers():
        return (
            f"onnxruntime {ort.__version__} has {PROVIDER}, but it does not start: no GPU, or no CUDA libraries for it"
        )
    return None


def _registered(options: ort.SessionOptions) -> ort.SessionOptions:
    register(options)
    return options


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bdq_runtime.gpu_selftest", description=__doc__)
    parser.add_argument("--small", action="store_true", help="leave out the sizes of real models")
    chosen = parser.parse_args(arguments)
    os.environ["BDQ_CUDA"] = "1"  # read when the library is registered for the first time
    ort.set_default_logger_severity(4)  # what goes wrong is said below, once
    problem = obstacle()
    if problem:
        print(f"The CUDA kernels were NOT tested: {problem}", file=sys.stderr)
        return 2
    failures = run_cases(CASES, run_on_gpu)
    if not chosen.small:
        failures += run_cases(large_cases(), run_on_gpu)
    if failures:
        print(f"{failures} cases are wrong. Leave BDQ_CUDA unset, and report this output with your GPU and driver.")
        return 1
    print("All cases agree. Set BDQ_CUDA=1 to use the CUDA kernels on this machine.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
