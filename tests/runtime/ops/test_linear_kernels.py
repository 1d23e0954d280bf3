"""The library's linear operators against NumPy: bit for bit where docs/ops.md says exact, on all remainders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from bdq_runtime.opset import BLOCK_SIZES, GATES, OPERATORS

GRIDS = [(2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1), (8, 0)]
# K, N: below, at and above chunks of 64, panels of 16 and pairs of panels
SHAPES = [(1, 1), (31, 16), (63, 17), (64, 33), (65, 48), (130, 15), (200, 100), (576, 49)]
ROWS = (1, 2, 4, 5, 16, 17, 33)
LINEARS = [name for name, operator in OPERATORS.items() if "weight" in operator.inputs]


def exact_scales(node: Any) -> Any:
    """The same node with scales that are powers of two: sums of them are exact in any order."""
    scales = node.inputs["scales"]
    with np.errstate(divide="ignore"):
        return node.with_input("scales", np.exp2(np.rint(np.log2(scales.astype(np.float32)))).astype(np.float16))


def rows_of(node: Any, rows: int, random: np.random.Generator) -> Any:
    """The same node for so many rows, of different sizes."""
    k = node.attributes["K"]
    x = random.standard_normal((rows, k)) * np.exp2(random.integers(-9, 9, (rows, 1)))
    return node.with_input("x", x.astype(np.float32))


def assert_equal_bits(found: Any, expected: Any, what: str = "") -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    different = found.view(np.uint32) != expected.view(np.uint32)
    assert not different.any(), f"{what}: {different.mean():.2%} of {found.shape} differ: {found - expected}"


@pytest.mark.parametrize("activation_bits", [3, 4, 8])
@pytest.mark.parametrize(("weight_bits", "weight_grid"), GRIDS)
def test_integers_are_exact(
    linear_node: Callable[..., Any],
    open_everywhere: Callable[..., Mapping[str, ort.InferenceSession]],
    random: np.random.Generator,
    weight_bits: int,
    weight_grid: int,
    activation_bits: int,
) -> None:
    attributes = {"weight_bits": weight_bits, "weight_grid": weight_grid, "activation_bits": activation_bits}
    for k, n in SHAPES:
        node = linear_node("LowBitLinearBias", 1, k, n, activation_clip=0.9, **attributes)
        sessions = open_everywhere(node.proto(shapes=False))
        for rows in ROWS:
            node = rows_of(node, rows, random)
            (expected,) = node.reference()
            for isa, session in sessions.items():
                (found,) = session.run(None, node.feeds())
                assert_equal_bits(found, expected, f"{isa}, {rows} rows, K {k}, N {n}")


@pytest.mark.parametrize("activation_bits", [3, 4, 8])
@pytest.mark.parametrize(("weight_bits", "weight_grid"), GRIDS)
def test_the_largest_codes_overflow_nothing(
    linear_node: Callable[..., Any],
    open_everywhere: Callable[..., Mapping[str, ort.InferenceSession]],
    weight_bits: int,
    weight_grid: int,
    activation_bits: int,
) -> None:
    attributes = {"weight_bits": weight_bits, "weight_grid": weight_grid, "activation_bits": activation_bits}
    for k, block_size in ((2304, 0), (768, 256)):  # float sums of blocks stay below 2^24
        node = linear_node("LowBitLinear", 1, k, 16, activation_clip=0.5, block_size=block_size, **attributes)
        for code in (0, 255):  # all bits of all codes
            node = exact_scales(node.with_input("weight", np.full_like(node.inputs["weight"], code)))
            for rows in (1, 4, 5):
                x = np.ones((rows, k), np.float32)
                x[0], x[-1, ::64] = -1, 0  # all at the lowest code, none alike, at the highest
                node = node.with_input("x", x)
                (expected,) = node.reference()
                for isa, session in open_everywhere(node.proto(shapes=False)).items():
                    what = f"{isa}, {rows} rows, code {code}, block {block_size}"
                    assert_equal_bits(session.run(None, node.feeds())[0], expected, what)


@pytest.mark.parametrize("block_size", BLOCK_SIZES[1:])
@pytest.mark.parametrize(("weight_bits", "weight_grid"), GRIDS)
def test_blocks(
    linear_node: Callable[..., Any],
    open_everywhere: Callable[..., Mapping[str, ort.InferenceSession]],
    random: np.random.Generator,
    weight_bits: int,
    weight_grid: int,
    block_size: int,
) -> None:
    attributes = {"weight_bits": weight_bits, "weight_grid": weight_grid, "block_size": block_size}
    for k, n in SHAPES:
        node = linear_node("LowBitLinear", 1, k, n, activation_bits=4, **attributes)
        exact = exact_scales(node)
        sessions, exact_sessions = (open_everywhere(one.proto(shapes=False)) for one in (node, exact))
        for rows in (1, 3, 16, 21):
            node = rows_of(node, rows, random)
            feeds = node.feeds()
            (expected,) = node.reference()
            (exactly,) = exact.with_input("x", feeds["x"]).reference()
            for isa, session in sessions.items():
                what = f"{isa}, {rows} rows, K {k}, N {n}"
                # sums of integers times powers of two: exact in any order
                assert_equal_bits(exact_sessions[isa].run(None, feeds)[0], exactly, what)
                assert np.abs(session.run(None, feeds)[0] - expected).max() <= 2e-6 * np.abs(expected).max(), what


@pytest.mark.parametrize("block_size", [0, 32, 128])
@pytest.mark.parametrize(("weight_bits", "weight_grid"), GRIDS)
def test_float_activations(
    linear_node: Callable[..., Any],
    open_everywhere: Callable[..., Mapping[str, ort.InferenceSession]],
    random: np.random.Generator,
    weight_bits: int,
    weight_grid: int,
    block_size: int,
) -> None:
    attributes = {"weight_bits": weight_bits, "weight_grid": weight_grid, "block_size": block_size}
    for k, n in SHAPES:
        node = linear_node("LowBitLinear", 1, k, n, activation_bits=16, **attributes)
        exact = exact_scales(node)
        sessions, exact_sessions = (open_everywhere(one.proto(shapes=False)) for one in (node, exact))
        for rows in (1, 3, 16, 21):
            node = rows_of(node, rows, random)
            (expected,) = node.reference()
            integers = {"x": random.integers(-9, 10, (rows, k)).astype(np.float32)}
            (exactly,) = exact.with_input("x", integers["x"]).reference()
            largest = np.abs(expected).max(-1, keepdims=True)
            for isa, session in sessions.items():
                what = f"{isa}, {rows} rows, K {k}, N {n}"
                np.testing.assert_array_equal(exact_sessions[isa].run(None, integers)[0], exactly, what)
                assert (np.abs(session.run(None, node.feeds())[0] - expected) <= 3e-6 * largest).all(), what


@pytest.mark.parametrize("name", LINEARS)
def test_every_operator(
    linear_node: Callable[..., Any],
    open_node: Callable[..., ort.InferenceSession],
    random: np.random.Generator,
    isa: str,
    name: str,
) -> None:
    gated = "gate" in OPERATORS[name].attributes
    for gate in GATES if gated else (None,):
        for k, n, block in ((64, 17, 0), (192, 33, 0), (320, 40, 64)):
            node = linear_node(name, 1, k, n, weight_bits=4, activation_bits=4, activation_clip=0.8, block_size=block)
            if gate:
                node = node.with_attributes(gate=gate)
            node = exact_scales(node)
            session = open_node(node.proto(shapes=False), isa)
            for rows in (1, 2, 17):
                node = rows_of(node, rows, random)
                (found,) = session.run(None, node.feeds())
                (expected,) = node.reference()
                if gated:  # exp and tanh are not exact
                    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
                else:
                    assert_equal_bits(found, expected, f"{rows} rows, K {k}, N {n}, block {block}")


@pytest.mark.parametrize("activation_bits", [4, 16])
@pytest.mark.parametrize(("k", "runs"), [(6, 3), (60, 20), (130, 13), (192, 3), (320, 64), (576, 9), (576, 576)])
def test_interleaved_inputs_are_those_of_a_transpose(
    linear_node: Callable[..., Any],
    open_everywhere: Callable[..., Mapping[str, ort.InferenceSession]],
    random: np.random.Generator,
    k: int,
    runs: int,
    activation_bits: int,
) -> None:
    plain = linear_node("HadamardLowBitLinearBias", 1, k, 33, activation_bits=activation_bits)
    node = plain.with_attributes(hadamard_interleave=runs)
    sessions, plain_sessions = (open_everywhere(one.proto(shapes=False)) for one in (node, plain))
    for rows in (1, 3, 16, 33):
        node = rows_of(node, rows, random)
        (expected,) = node.reference()
        turned = node.inputs["x"].reshape(rows, runs, k // runs).transpose(0, 2, 1).reshape(rows, k)
        for isa, session in sessions.items():
            (found,) = session.run(None, node.feeds())
            assert_equal_bits(found, plain_sessions[isa].run(None, {"x": turned})[0], f"{isa}, {rows} rows")
            if activation_bits < 16:
                assert_equal_bits(found, expected, f"{isa}, {rows} rows")
            else:
                np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_rows_that_are_zero_or_huge(linear_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str) -> None:
    node = linear_node("LowBitLinear", 6, 96, 20, activation_bits=8)
    x = node.inputs["x"].copy()
    x[0], x[1], x[2], x[3] = 0, 1e-38, 1e-30, 3e37
    node = node.with_input("x", x)
    with np.errstate(over="ignore"):
        assert_equal_bits(run_kernel(node, isa)[0], node.reference()[0])


def test_any_number_of_dimensions(linear_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str) -> None:
    node = linear_node("LowBitLinear", 12, 64, 20)
    expected = node.reference()[0]
    for shape in ((12,), (3, 4), (1, 2, 3, 2), (1, 12, 1, 1, 1, 1, 1)):
        shaped = node.with_input("x", node.inputs["x"].reshape(*shape, 64))
        assert_equal_bits(run_kernel(shaped, isa)[0], expected.reshape(*shape, 20))
    assert run_kernel(node.with_input("x", np.zeros((0, 64), np.float32)), isa)[0].shape == (0, 20)
    assert_equal_bits(run_kernel(node.with_input("x", node.inputs["x"][0]), isa)[0], expected[0])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(
    linear_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, threads: int
) -> None:
    for rows in (1, 70):
        node = linear_node("HadamardLowBitLinear", rows, 192, 400, activation_bits=4, weight_bits=3)
        assert_equal_bits(run_kernel(node, isa, threads)[0], node.reference()[0])


def test_a_scale_that_is_off_is_noticed(linear_node: Callable[..., Any], run_kernel: Callable[..., Any]) -> None:
    node = linear_node("LowBitLinear", 3, 64, 20)
    wrong = node.with_input("scales", (node.inputs["scales"] * np.float16(1.01)).astype(np.float16))
    with pytest.raises(AssertionError):
        assert_equal_bits(run_kernel(wrong)[0], node.reference()[0])
