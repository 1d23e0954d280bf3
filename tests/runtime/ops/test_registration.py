"""The library and the table of operators say the same; a session gets the kernels once."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from bdq_runtime.library import LibraryError, library_info, library_path, register
from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION

# The operators of version 2 and the SHA-256 of what their table says.
NAMES = (
    *("KVAttention", "PackedKVAttention", "RotaryKVAttention", "PackedRotaryKVAttention"),
    *(
        f"{rotated}{gated}LowBitLinear{bias}"
        for rotated in ("", "Hadamard")
        for gated in ("", "Gated")
        for bias in ("", "Bias")
    ),
    *("Hadamard", "DynamicFakeQuantize"),
)
TABLE = "ff06ebb8f0485e3283e7fe012a8ddef31fa277a846b33fee7fe83d3f4de2fa44"


def test_an_operator_never_changes() -> None:
    """ONNX Runtime does not tell a kernel of attributes that it does not ask for: an older library would compute
    something else and say nothing. A new name it leaves to the function in the file."""
    told = json.dumps({name: library_info().operators[name] for name in NAMES}, sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest() == TABLE


def test_models_of_older_versions_run(
    linear_node: Callable[..., Any], open_node: Callable[..., ort.InferenceSession]
) -> None:
    node = linear_node("HadamardLowBitLinear", 2, 64, 16)
    expected = open_node(node.proto()).run(None, node.feeds())[0]
    for version in range(1, VERSION):
        model = node.proto()
        (own,) = [each for each in model.opset_import if each.domain == DOMAIN]
        own.version = version
        assert np.array_equal(open_node(model).run(None, node.feeds())[0], expected)


def test_the_library_registers_the_table() -> None:
    assert library_info().version == VERSION
    expected = {
        name: {
            "inputs": dict(operator.inputs),
            "outputs": dict(operator.outputs),
            "attributes": {
                key: {"type": value.__name__}
                if isinstance(value, type)
                else {"type": type(value).__name__, "default": value}
                for key, value in operator.attributes.items()
            },
        }
        for name, operator in OPERATORS.items()
    }
    assert library_info().operators == expected
    for name, operator in OPERATORS.items():  # inputs go by position
        assert list(library_info().operators[name]["inputs"]) == list(operator.inputs), name


def test_every_operator_has_a_cpu_kernel(
    linear_node: Callable[..., Any],
    attention_node: Callable[..., Any],
    open_node: Callable[..., ort.InferenceSession],
) -> None:
    for name, operator in OPERATORS.items():
        if "weight" in operator.inputs:
            open_node(linear_node(name, 1, 64, 16).proto())
        elif "past_key" in operator.inputs:
            open_node(attention_node(name).proto())


def test_registering_twice_changes_nothing(linear_node: Callable[..., Any]) -> None:
    node = linear_node("LowBitLinear", 2, 64, 16)
    options = ort.SessionOptions()
    for _ in range(3):
        register(options)
    options.register_custom_ops_library(str(library_path()))  # as any other program does it
    session = ort.InferenceSession(node.proto().SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert session.run(None, node.feeds())[0].shape == (2, 16)


@pytest.mark.parametrize("name", ["mmx", "AVX2"])
def test_an_unknown_instruction_set_is_named(name: str) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("bdq.isa", name)
    with pytest.raises(LibraryError, match=rf"{name} is not supported here, expected one of scalar"):
        register(options)


def test_the_environment_forces_an_instruction_set() -> None:
    code = "import onnxruntime as ort, bdq_runtime; bdq_runtime.register(ort.SessionOptions())"
    good = subprocess.run([sys.executable, "-c", code], env={**os.environ, "BDQ_ISA": "scalar"}, capture_output=True)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([sys.executable, "-c", code], env={**os.environ, "BDQ_ISA": "mmx"}, capture_output=True)
    assert bad.returncode == 1
    assert b"LibraryError" in bad.stderr
    assert b"mmx" in bad.stderr
    assert b"scalar" in bad.stderr


def test_only_two_functions_are_exported() -> None:
    if sys.platform != "linux" or "BDQ_LIBRARY" in os.environ:
        pytest.skip("needs nm and the library of a release")
    found = subprocess.run(["nm", "-D", "--defined-only", library_path()], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("needs nm")
    names = {line.split()[-1] for line in found.stdout.splitlines()}
    assert names == {"RegisterCustomOps", "bdq_describe"}


@pytest.mark.parametrize("shapes", [True, False])
def test_shapes_are_inferred(
    linear_node: Callable[..., Any],
    attention_node: Callable[..., Any],
    open_node: Callable[..., ort.InferenceSession],
    shapes: bool,
) -> None:
    node = linear_node("LowBitLinear", 3, 64, 21)
    found = open_node(node.proto(shapes=shapes)).get_outputs()
    assert found[0].shape == ([3, 21] if shapes else [])
    node = attention_node("KVAttention", past=[3, 5], tokens=2, room=1)
    proto = node.proto(shapes=shapes)
    declared = helper.make_tensor_value_info("present_key", TensorProto.UINT8, [2, 2, "present", 12])
    proto.graph.output[1].CopyFrom(declared)  # how many positions, only the model knows
    outputs = open_node(proto).get_outputs()
    assert outputs[0].shape == ([2, 2, 64] if shapes else [])
    assert outputs[1].shape == [2, 2, "present", 12]
    assert np.shape(open_node(node.proto(shapes=shapes)).run(None, node.feeds())[1]) == (2, 2, 7, 12)
