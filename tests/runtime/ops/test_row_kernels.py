"""Hadamard and DynamicFakeQuantize of the library against NumPy, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bdq_runtime.opset import OPERATORS

Array = Any


def rows(random: np.random.Generator, *shape: int) -> Array:
    x = random.standard_normal(shape) * np.exp2(random.integers(-20, 20, (*shape[:-1], 1)))
    x[0] = 0
    return x.astype(np.float32)


@pytest.fixture
def node(request: pytest.FixtureRequest, linear_node: Callable[..., Any]) -> Callable[..., Any]:
    template = linear_node("LowBitLinear", 1, 64, 16)

    def make(name: str, x: Array, **attributes: Any) -> Any:
        return type(template)(OPERATORS[name], {"x": x}, attributes)

    return make


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16, 32, 64, 128, 512, 4096])
def test_hadamard(
    node: Callable[..., Any], run_kernel: Callable[..., Any], random: np.random.Generator, isa: str, size: int
) -> None:
    for k in (size, 3 * size, 17 * size) if size < 4096 else (size,):
        one = node("Hadamard", rows(random, 5, k), size=size)
        np.testing.assert_array_equal(run_kernel(one, isa)[0], one.reference()[0])


# K, size, runs: few of them, few channels each, none or all of it in fours, all channels
INTERLEAVED = [(6, 2, 2), (6, 2, 3), (60, 4, 15), (60, 4, 20), (64, 16, 64), (140, 4, 14), (576, 64, 9), (4100, 4, 5)]


@pytest.mark.parametrize(("k", "size", "runs"), INTERLEAVED)
def test_interleaved_hadamard(
    node: Callable[..., Any],
    run_kernel: Callable[..., Any],
    random: np.random.Generator,
    isa: str,
    k: int,
    size: int,
    runs: int,
) -> None:
    one = node("Hadamard", rows(random, 5, k), size=size, interleave=runs)
    (found,) = run_kernel(one, isa)
    np.testing.assert_array_equal(found, one.reference()[0])
    turned = one.inputs["x"].reshape(5, runs, k // runs).transpose(0, 2, 1).reshape(5, k)
    plain = run_kernel(node("Hadamard", turned, size=size), isa)[0]
    np.testing.assert_array_equal(found.view(np.uint32), plain.view(np.uint32))


def test_interleaving_that_cannot_be_is_refused(node: Callable[..., Any], open_node: Callable[..., Any]) -> None:
    x = np.ones((2, 24), np.float32)
    for runs in (0, -3, 2**32 + 3, 3.0):
        with pytest.raises(Exception, match="'the_node': attribute interleave is") as error:
            open_node(node("Hadamard", x, size=8, interleave=runs).proto())
        assert "\n" not in str(error.value)
    session = open_node(node("Hadamard", x, size=8, interleave=5).proto(shapes=False))
    with pytest.raises(Exception, match="x has 24 channels, expected a multiple of interleave, 5"):
        session.run(None, {"x": x})
    assert session.run(None, {"x": np.ones((2, 40), np.float32)})[0].shape == (2, 40)


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_fake_quantize(
    node: Callable[..., Any], run_kernel: Callable[..., Any], random: np.random.Generator, isa: str, bits: int
) -> None:
    for k in (1, 7, 16, 31, 64, 100, 577, 5000):
        for clip in (1.0, 0.7):
            one = node("DynamicFakeQuantize", rows(random, 2, 3, k), bits=bits, clip=clip)
            np.testing.assert_array_equal(run_kernel(one, isa)[0], one.reference()[0])


def test_ties_round_to_even(node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str) -> None:
    x = np.arange(-254, 255, dtype=np.float32)[None] / 2  # with scale 1: every half between two codes
    one = node("DynamicFakeQuantize", x, bits=8)
    np.testing.assert_array_equal(run_kernel(one, isa)[0], one.reference()[0])
    assert np.unique(run_kernel(one, isa)[0]).size == 255
