"""The library's attention against NumPy: the cache bit for bit, the output to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bdq_runtime.opset import KV_BITS, OPERATORS

ATTENTIONS = [name for name, operator in OPERATORS.items() if "past_key" in operator.inputs]


def assert_matches(found: list[Any], expected: tuple[Any, ...], what: str = "") -> None:
    for i in (1, 2):
        np.testing.assert_array_equal(found[i], expected[i], err_msg=what)
    tolerance = 1e-5 * np.abs(expected[0]).max()
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=tolerance, err_msg=what)


@pytest.mark.parametrize("value_bits", KV_BITS)
@pytest.mark.parametrize("key_bits", KV_BITS)
def test_bits(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, key_bits: int, value_bits: int
) -> None:
    for past, tokens in ((0, 1), (0, 33), (70, 1), (9, 5), (130, 3)):
        for size in (8, 24, 64):
            node = attention_node(
                "KVAttention",
                past,
                tokens,
                heads=(4, 2, size),
                key_bits=key_bits,
                value_bits=value_bits,
                key_clip=0.9,
                value_clip=0.95,
            )
            assert_matches(run_kernel(node, isa), node.reference(), f"{past} + {tokens} tokens of {size}")


@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_operator(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, name: str
) -> None:
    for past, tokens, room in ((0, 7, 0), (0, 7, 9), (5, 1, 0), (5, 1, 4), (12, 6, 1)):
        for hadamard in (0, 1):
            node = attention_node(name, past, tokens, (6, 3, 32), room=room, hadamard=hadamard)
            assert_matches(run_kernel(node, isa), node.reference(), f"{past} + {tokens} tokens, {room} more positions")


@pytest.mark.parametrize("rotary_dim", [8, 24, 48])
def test_partial_rotary(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, rotary_dim: int
) -> None:
    node = attention_node("RotaryKVAttention", 4, 3, (2, 2, 48), rotary_dim=rotary_dim)
    assert_matches(run_kernel(node, isa), node.reference())


@pytest.mark.parametrize("name", ATTENTIONS)
def test_rows_of_different_lengths(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, name: str
) -> None:
    for pasts, tokens in (([3, 9, 1], 1), ([8, 8], 3), ([0, 5], 2)):
        node = attention_node(name, pasts, tokens, room=2)
        assert_matches(run_kernel(node, isa), node.reference(), f"{pasts}")


@pytest.mark.parametrize("bits", KV_BITS)
@pytest.mark.parametrize("heads", [(1, 1, 16), (8, 1, 16), (9, 3, 64), (5, 5, 8), (8, 2, 128), (4, 2, 256)])
def test_head_counts(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, heads: tuple[int, int, int], bits: int
) -> None:
    for past, tokens in ((17, 1), (3, 20)):
        node = attention_node("PackedRotaryKVAttention", past, tokens, heads, key_bits=bits, value_bits=bits)
        assert_matches(run_kernel(node, isa), node.reference())


@pytest.mark.parametrize("window", [1, 2, 7, 64])
def test_sliding_window(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, window: int
) -> None:
    for past, tokens in ((0, 40), (90, 1), (30, 9)):
        node = attention_node("KVAttention", past, tokens, local_window_size=window)
        assert_matches(run_kernel(node, isa), node.reference())


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, softcap: float) -> None:
    for past, tokens in ((0, 12), (20, 1)):
        node = attention_node("KVAttention", past, tokens, softcap=softcap)
        assert_matches(run_kernel(node, isa), node.reference())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_cache(
    attention_node: Callable[..., Any], run_kernel: Callable[..., Any], isa: str, threads: int
) -> None:
    for past, tokens in ((200, 1), (0, 90)):
        node = attention_node("PackedRotaryKVAttention", past, tokens, (6, 2, 64))
        assert_matches(run_kernel(node, isa, threads), node.reference())
