"""One file, two ways to run it: the library's kernels and the functions of standard operators compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bdq_passes.functions import attach_functions
from bdq_runtime.opset import ACTIVATION_BITS, GATES, KV_BITS, OPERATORS

GRIDS = [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (8, 0)]
LINEARS = [name for name, operator in OPERATORS.items() if "weight" in operator.inputs]
ATTENTIONS = [name for name, operator in OPERATORS.items() if "past_key" in operator.inputs]


@pytest.fixture
def run_both(open_node: Callable[..., ort.InferenceSession]) -> Callable[..., Iterator[tuple[list[Any], list[Any]]]]:
    """The outputs of the kernel and of the function, for each number of rows: `run_both(node, feeds, ...)`."""

    def run(node: Any, *feeds: dict[str, Any]) -> Iterator[tuple[list[Any], list[Any]]]:
        model = ir.from_proto(node.proto(shapes=False))
        attach_functions(model)
        proto = ir.to_proto(model)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        plain = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        library = open_node(proto)
        for feed in feeds or (node.feeds(),):
            yield library.run(None, feed), plain.run(None, feed)

    return run


def rows(k: int, random: np.random.Generator) -> list[dict[str, Any]]:
    spread = [np.exp2(random.integers(-9, 9, (m, 1))) for m in (1, 3, 17)]
    return [{"x": (random.standard_normal((len(s), k)) * s).astype(np.float32)} for s in spread]


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    largest = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(found - expected) <= tolerance * largest).all(), np.abs(found - expected).max() / largest.max()


@pytest.mark.parametrize("activation_bits", [bits for bits in ACTIVATION_BITS if bits < 16])
@pytest.mark.parametrize(("weight_bits", "weight_grid"), GRIDS)
def test_integers_are_the_same_bits(
    linear_node: Callable[..., Any],
    run_both: Callable[..., Any],
    random: np.random.Generator,
    weight_bits: int,
    weight_grid: int,
    activation_bits: int,
) -> None:
    attributes = {"weight_bits": weight_bits, "weight_grid": weight_grid, "activation_bits": activation_bits}
    for k, n in ((1, 1), (63, 17), (65, 31), (200, 49)):
        node = linear_node("LowBitLinearBias", 1, k, n, activation_clip=0.9, **attributes)
        for kernel, function in run_both(node, *rows(k, random)):
            np.testing.assert_array_equal(kernel[0].view(np.uint32), function[0].view(np.uint32))


@pytest.mark.parametrize("block_size", [0, 32, 128])
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("weight_bits", [3, 4])
def test_sums_of_floats_are_close(
    linear_node: Callable[..., Any],
    run_both: Callable[..., Any],
    random: np.random.Generator,
    weight_bits: int,
    activation_bits: int,
    block_size: int,
) -> None:
    attributes = {"weight_bits": weight_bits, "activation_bits": activation_bits, "block_size": block_size}
    for k, n in ((64, 33), (200, 49)):
        node = linear_node("LowBitLinear", 1, k, n, **attributes)
        for kernel, function in run_both(node, *rows(k, random)):
            assert_close(kernel[0], function[0])


@pytest.mark.parametrize("name", LINEARS)
def test_linears(
    linear_node: Callable[..., Any], run_both: Callable[..., Any], random: np.random.Generator, name: str
) -> None:
    gated = "gate" in OPERATORS[name].attributes
    interleaves = (1, 3) if "hadamard_interleave" in OPERATORS[name].attributes else (None,)
    for gate, interleave in product(GATES if gated else (None,), interleaves):
        node = linear_node(name, 1, 192, 40, activation_bits=4).with_attributes(
            gate=gate, hadamard_interleave=interleave
        )
        for kernel, function in run_both(node, *rows(192, random)):
            if gated:
                assert_close(kernel[0], function[0])
            else:
                np.testing.assert_array_equal(kernel[0].view(np.uint32), function[0].view(np.uint32))


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attentions(attention_node: Callable[..., Any], run_both: Callable[..., Any], name: str, bits: int) -> None:
    options: tuple[dict[str, Any], ...] = ({}, {"hadamard": 1}, {"local_window_size": 3, "softcap": 20.0})
    for attributes in options:
        for past, tokens, room in ((0, 9, 0), (7, 1, 5), ([3, 6], 2, 1)):
            node = attention_node(
                name, past, tokens, (4, 2, 32), room=room, key_bits=bits, value_bits=bits, **attributes
            )
            for kernel, function in run_both(node):
                for i in (1, 2):
                    np.testing.assert_array_equal(kernel[i], function[i])
                # scores of a few tens: their last bits are 1e-5 of a softmax
                assert_close(kernel[0], function[0], 5e-5)


def test_rows(linear_node: Callable[..., Any], run_both: Callable[..., Any], random: np.random.Generator) -> None:
    template = linear_node("LowBitLinear", 1, 64, 16)
    hadamards = [("Hadamard", {"size": 64, "interleave": runs}) for runs in (1, 3, 8)]
    for name, attributes in (*hadamards, ("DynamicFakeQuantize", {"bits": 4, "clip": 0.8})):
        node = type(template)(OPERATORS[name], {"x": template.inputs["x"]}, attributes)
        for kernel, function in run_both(node, *rows(192, random)):
            np.testing.assert_array_equal(kernel[0], function[0])  # 0 may have either sign
