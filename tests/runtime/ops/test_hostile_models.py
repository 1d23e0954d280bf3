"""A node that is not what its operator says is refused when the session is created, in one line, whatever it claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

HUGE = 2**62
LINEAR = {
    "K": [0, -1, 64, 191, 193, 256, HUGE, -HUGE, 2**63 - 1, -(2**63), 1.0, "64"],
    "N": [0, -1, 20, 37, HUGE, 2**63 - 1, -(2**63), 1.0],
    "weight_bits": [0, 1, 3, 5, 8, -4, 2**32 + 4, HUGE, 4.0],
    "weight_grid": [2, -1, 2**32, 1.0],
    "block_size": [1, 16, 31, 64, -32, 512, HUGE, 32.0],
    "activation_bits": [0, 1, 2, 5, 7, 32, -8, 2**32 + 8, 8.0],
    "activation_clip": [0.0, -1.0, float("inf"), float("nan"), 1, "1"],
    "hadamard_size": [0, -64, 3, 48, 128, 192, 2**13, 2**32 + 64, HUGE, 64.0],
    "hadamard_interleave": [0, -1, -3, 5, 193, 384, 2**32 + 3, HUGE, -(2**63), 3.0, "3"],
    "gate": ["relu", "", "silu ", 1, 1.0],
}
ATTENTION = {
    "num_heads": [0, -4, 3, 5, 8, HUGE, 2**63 - 1, 4.0],
    "kv_num_heads": [0, -2, 3, 4, HUGE, 2**63 - 1, 2.0],
    "head_size": [0, -16, 8, 12, 17, 32, HUGE, 2**63 - 1, 16.0],
    "key_bits": [0, 2, 3, 5, 8, 16, -4, 2**32 + 4, 4.0],
    "value_bits": [0, 2, 3, 5, 8, 16, -4, 2**32 + 4, 4.0],
    "key_clip": [0.0, -1.0, float("inf"), float("nan"), 1],
    "value_clip": [0.0, -1.0, float("inf"), float("nan"), 1],
    "hadamard": [2, -1, 1.0],
    "scale": [float("inf"), float("nan"), 1],
    "softcap": [float("inf"), float("nan"), -1.0, 1],
    "local_window_size": [1.0, "none"],
}


def cases(attributes: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in attributes.items() for value in values]


def refused(open_node: Callable[..., ort.InferenceSession], proto: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as error:
        open_node(proto)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize(("name", "value"), cases(LINEAR))
def test_linear_attributes(
    linear_node: Callable[..., Any], open_node: Callable[..., Any], name: str, value: Any, shapes: bool
) -> None:
    node = linear_node("HadamardGatedLowBitLinearBias", 2, 192, 36).with_attributes(**{name: value})
    refused(open_node, node.proto(shapes=shapes), r"bdq::HadamardGatedLowBitLinearBias 'the_node': ")


@pytest.mark.parametrize("shapes", [True, False])
@pytest.mark.parametrize(("name", "value"), cases(ATTENTION))
def test_attention_attributes(
    attention_node: Callable[..., Any], open_node: Callable[..., Any], name: str, value: Any, shapes: bool
) -> None:
    node = attention_node("RotaryKVAttention").with_attributes(**{name: value})
    if shapes:
        refused(open_node, node.proto(), r"bdq::RotaryKVAttention 'the_node': ")
        return
    # What only the shapes of inputs contradict, a graph without shapes shows when it runs.
    with pytest.raises(Exception, match=r"bdq::RotaryKVAttention 'the_node': |expected"):
        open_node(node.proto(shapes=False)).run(None, node.feeds())


@pytest.mark.parametrize("name", ["K", "N", "weight_bits", "activation_bits", "hadamard_size"])
def test_linear_attribute_left_out(linear_node: Callable[..., Any], open_node: Callable[..., Any], name: str) -> None:
    node = linear_node("HadamardLowBitLinear", 2, 64, 36).with_attributes(**{name: None})
    refused(open_node, node.proto(), f"attribute {name} is missing, expected an int")


@pytest.mark.parametrize("name", ["num_heads", "kv_num_heads", "head_size", "key_bits", "value_bits", "scale"])
def test_attention_attribute_left_out(
    attention_node: Callable[..., Any], open_node: Callable[..., Any], name: str
) -> None:
    node = attention_node("KVAttention").with_attributes(**{name: None})
    refused(open_node, node.proto(), f"attribute {name} is missing")


def broken(array: Any) -> list[Any]:
    """The array with one dimension shorter, longer, empty, gone, or one more."""
    found = [np.asarray(array[0]), array[None]]
    for axis in range(array.ndim):
        found.append(np.delete(array, -1, axis))
        found.append(np.concatenate([array, np.take(array, [0], axis)], axis))
        found.append(np.zeros([0 if i == axis else size for i, size in enumerate(array.shape)], array.dtype))
    return [changed for changed in found if changed.shape != array.shape]


@pytest.mark.parametrize("name", ["weight", "scales", "bias", "diagonal"])
def test_linear_constants(linear_node: Callable[..., Any], open_node: Callable[..., Any], name: str) -> None:
    node = linear_node("HadamardGatedLowBitLinearBias", 2, 192, 36, block_size=64)
    for array in broken(node.inputs[name]):
        proto = node.with_input(name, array).proto()
        refused(open_node, proto, rf"'the_node': input {name} is \[.*\], expected \[.*\] for these attributes")
    fed = [other for other in ("weight", "scales", "bias", "diagonal") if other != name and name != "scales"]
    if name != "scales":  # float16 is no type of this test's graph inputs
        refused(open_node, node.proto(constants=[*fed, "scales"]), f"input {name} is not constant")


@pytest.mark.parametrize("name", ["cos_cache", "sin_cache"])
def test_rotary_tables(attention_node: Callable[..., Any], open_node: Callable[..., Any], name: str) -> None:
    node = attention_node("RotaryKVAttention", past=3)
    for array in broken(node.inputs[name]):
        refused(open_node, node.with_input(name, array).proto(), r"'the_node': (cos|sin)_cache is \[.*\], expected")


def test_columns_of_the_graph_contradict(linear_node: Callable[..., Any], open_node: Callable[..., Any]) -> None:
    node = linear_node("LowBitLinear", 2, 64, 36)
    wide = node.with_input("x", np.zeros((2, 65), np.float32))
    refused(open_node, wide.proto(), r"input x is \[2, 65\], expected 64 in the last dimension")
    session = open_node(node.proto(shapes=False))
    for shape in ((2, 65), (2, 63), (64, 2), (2, 0), ()):
        with pytest.raises(Exception, match="expected 64 in the last dimension"):
            session.run(None, {"x": np.zeros(shape, np.float32)})
    with pytest.raises(Exception, match="9 dimensions, expected at most 8"):
        session.run(None, {"x": np.zeros((1,) * 8 + (64,), np.float32)})


def test_missing_inputs(linear_node: Callable[..., Any], open_node: Callable[..., Any]) -> None:
    for index in range(4):
        proto = linear_node("LowBitLinearBias", 2, 64, 36).proto()
        proto.graph.node[0].input[index] = ""
        with pytest.raises(Exception, match=r"[Ii]nput"):
            open_node(proto).run(None, {"x": np.zeros((2, 64), np.float32)})
        proto = linear_node("LowBitLinearBias", 2, 64, 36).proto()
        del proto.graph.node[0].input[index:]
        with pytest.raises(Exception, match=r"[Ii]nput"):
            open_node(proto)


@pytest.mark.parametrize("name", ["KVAttention", "PackedRotaryKVAttention"])
def test_attention_at_run_time(attention_node: Callable[..., Any], open_node: Callable[..., Any], name: str) -> None:
    node = attention_node(name, past=[4, 6], tokens=2, room=3)
    session = open_node(node.proto(shapes=False))
    good = node.feeds()
    session.run(None, good)
    parts = [part for part in good if part != "total_sequence_length"]
    wrong: list[dict[str, Any]] = [{part: array} for part in parts for array in broken(good[part])]
    wrong += [{"seqlens_k": np.array(lengths, np.int32)} for lengths in ([-1, 5], [8, 5], [2**31 - 1, 5], [0, 7])]
    wrong += [{"total_sequence_length": np.array(n, np.int32)} for n in (-1, 0, 1, 7, 12, 2**31 - 1, -(2**31))]
    wrong += [{"total_sequence_length": np.array([8, 8], np.int32)}]
    for change in wrong:
        if "seqlens_k" in change and change["seqlens_k"].size == 2 and (change["seqlens_k"] == [5, 7]).all():
            continue  # [1, B] is as good
        if "qkv" in change and change["qkv"].shape in ((2, 1, 128), (2, 3, 128)):
            continue  # so are other numbers of tokens
        with pytest.raises(Exception, match="expected") as error:
            session.run(None, {**good, **change})
        assert "\n" not in str(error.value)
    session.run(None, good)  # nothing stays


def test_positions_beyond_the_rotary_table(attention_node: Callable[..., Any], open_node: Callable[..., Any]) -> None:
    node = attention_node("RotaryKVAttention", past=4, tokens=2)
    for table in ("cos_cache", "sin_cache"):
        node = node.with_input(table, node.inputs[table][:5])
    session = open_node(node.proto())
    with pytest.raises(Exception, match="cos_cache"):
        session.run(None, node.feeds())
