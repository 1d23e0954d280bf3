"""ONNX Runtime, the CUDA operators, a mock driver and the interpreted kernels, end to end, against the NumPy reference.

Everything but ONNX Runtime's CUDA provider and the GPU itself: the operators are registered for the CPU provider (with
`BDQ_CUDA=mock`), so "device" memory is host memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from bdq_runtime.gpu.cases import CASES, Case, rows
from bdq_runtime.gpu_selftest import compare
from bdq_runtime.library import LibraryMissingError, library_path
from bdq_runtime.opset import OPERATORS

_HERE = Path(__file__).parent


def _broken(case: Case, **changes: Any) -> Case:
    inputs = {name: changes.get(name, array) for name, array in case.inputs.items()}
    attributes = {**case.attributes, **{name: value for name, value in changes.items() if name not in inputs}}
    return Case(case.operator, case.exact, inputs, attributes)


_LENGTHS = np.array([6, 7], np.int32)
REFUSED = {
    "weight is": _broken(CASES["gemv"], weight=np.zeros((3, 1, 512), np.uint8)),
    "weight_bits is": _broken(CASES["gemv"], weight_bits=5),
    "expected 96": _broken(CASES["gemv"], x=np.zeros((1, 1, 90), np.float32)),
    "seqlens_k is": _broken(CASES["decode, 3 and 8 bits"], seqlens_k=_LENGTHS),
    "past_key is": _broken(CASES["prompt"], past_key=np.zeros((1, 2, 0, 11), np.uint8)),
    "at most 256": _broken(CASES["prompt"], head_size=264),
    "expected a multiple of size": _broken(CASES["hadamard"], size=64),
    "expected a multiple of interleave": _broken(CASES["hadamard"], interleave=5),
    "hadamard_interleave is 5": _broken(CASES["hadamard gemv"], hadamard_interleave=5),
}
"""What an error says, for a call that is wrong."""

# What a GPU gets: machine code for its capability, for 8.x also older code, else PTX (0).
TARGETS = {86: 80, 89: 89, 100: 100, 103: 0, 120: 120, 121: 0}
OLD = 75


IN_PLACE = rows("Hadamard", 1, 1536, size=64, interleave=6)
"""More than one segment of a program: the second reads what the first would have written."""


def _in_place() -> onnx.ModelProto:
    """The interleaved Hadamard transform of -x, minus: ONNX Runtime may give it its input as output."""
    model = onnx.load_from_string(IN_PLACE.model())
    node = model.graph.node[0]
    node.input[0], node.output[0] = "minus_x", "minus_y"
    before, after = helper.make_node("Neg", ["x"], ["minus_x"]), helper.make_node("Neg", ["minus_y"], ["y"])
    nodes = [before, node, after]
    sizes = IN_PLACE.inputs["x"].shape  # ONNX Runtime has to know that both are of one size
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, sizes))
    model.graph.ClearField("node")
    model.graph.node.extend(nodes)
    return model


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases on an emulated GPU of compute capability 9.0, and one on others; in a process with the mock driver."""
    pytest.importorskip("triton", reason="Triton is not installed (pip install 'bdq-export[gpu-build]')")
    try:
        library_path()
    except LibraryMissingError:
        pytest.skip("the op library was not built")
    folder = tmp_path_factory.mktemp("emulated")
    for name, case in {**CASES, **REFUSED}.items():
        (folder / f"{name}.onnx").write_bytes(case.model())
        np.savez(folder / f"{name}.npz", **case.feeds())
    onnx.save(_in_place(), folder / "in place.onnx")
    np.savez(folder / "in place.npz", **IN_PLACE.feeds())
    mock = folder / "libcuda.so.1"
    compiler = ["gcc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*compiler, str(_HERE / "mock_libcuda.c"), "-o", str(mock)], check=True)
    runs = ["90", *(f"{capability}:gemv" for capability in (*TARGETS, OLD))]
    command = [sys.executable, str(_HERE / "emulate.py"), str(mock), str(folder), *runs]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


@pytest.mark.parametrize("name", CASES)
def test_operators_on_the_emulated_gpu_equal_the_reference(results: Path, name: str) -> None:
    case = CASES[name]
    failed = results / f"{name}.90.error"
    assert not failed.exists(), failed.read_text()
    found = np.load(results / f"{name}.90.out.npz")
    right, words = compare(case, [found[output] for output in OPERATORS[case.operator].outputs], tolerance=5e-6)
    assert right, words


def test_interleaving_may_have_its_output_where_its_input_is(results: Path) -> None:
    failed = results / "in place.90.error"
    assert not failed.exists(), failed.read_text()
    (expected,) = IN_PLACE.expected()
    np.testing.assert_array_equal(np.load(results / "in place.90.out.npz")["y"], expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_cpu_refuses_is_refused(results: Path, name: str) -> None:
    message = (results / f"{name}.90.error").read_text()
    assert name in message
    assert "Traceback" not in message


def test_contexts_are_balanced_and_images_loaded_once(results: Path) -> None:
    report = json.loads((results / "report.json").read_text())
    launched = {image for images in report["launches"].values() for image in images}
    assert report["context_depth"] == 0
    assert report["loads"] == len(launched)


@pytest.mark.parametrize(("capability", "target"), [(90, 90), *TARGETS.items()])
def test_each_gpu_gets_its_image_or_ptx(results: Path, capability: int, target: int) -> None:
    failed = results / f"gemv.{capability}.error"
    assert not failed.exists(), failed.read_text()
    launches = json.loads((results / "report.json").read_text())["launches"][str(capability)]
    assert {image.rsplit("_", 1)[1] for image in launches} == {str(target)}


def test_an_old_gpu_is_refused_by_name(results: Path) -> None:
    message = (results / f"gemv.{OLD}.error").read_text()
    assert "compute capability 7.5, the bdq kernels need 8.0 or newer" in message
