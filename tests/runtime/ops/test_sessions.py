"""The kernels under real use: sessions and threads side by side, a cache written in place, files read from disk."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bdq_runtime.opset import VERSION
from bdq_runtime.reference import hadamard
from bdq_runtime.session import create_session


def test_one_session_on_many_threads(linear_node: Callable[..., Any], open_node: Callable[..., Any]) -> None:
    node = linear_node("HadamardGatedLowBitLinear", 1, 128, 96, activation_bits=4)
    session = open_node(node.proto(shapes=False), threads=2)
    inputs = [np.random.default_rng(i).standard_normal((1 + i % 20, 128)).astype(np.float32) for i in range(40)]
    alone = [session.run(None, {"x": x})[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda x: session.run(None, {"x": x})[0], inputs))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_two_sessions_at_once(
    linear_node: Callable[..., Any], attention_node: Callable[..., Any], open_node: Callable[..., Any]
) -> None:
    nodes = [linear_node("LowBitLinear", 9, 192, 64), attention_node("PackedRotaryKVAttention", 20, 2)]
    sessions = [open_node(node.proto(), threads=2) for node in nodes]
    expected = [session.run(None, node.feeds()) for session, node in zip(sessions, nodes, strict=True)]

    def work(i: int) -> None:
        found = sessions[i].run(None, nodes[i].feeds())
        for a, b in zip(found, expected[i], strict=True):
            np.testing.assert_array_equal(a, b)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [0, 1] * 20))
    del sessions[0]  # the other goes on
    work_again = sessions[0].run(None, nodes[1].feeds())
    np.testing.assert_array_equal(work_again[1], expected[1][1])


@pytest.mark.parametrize("name", ["KVAttention", "PackedRotaryKVAttention"])
def test_a_shared_buffer_is_appended_to(
    attention_node: Callable[..., Any], open_node: Callable[..., Any], isa: str, name: str
) -> None:
    node = attention_node(name, past=11, tokens=2, room=30)
    expected = node.reference()
    session = open_node(node.proto(shapes=False), isa)
    buffers = {part: node.inputs[f"past_{part}"].copy() for part in ("key", "value")}
    io = session.io_binding()
    for feed, array in node.feeds().items():
        if not feed.startswith("past_"):
            io.bind_cpu_input(feed, array)
    for part, buffer in buffers.items():
        for bind, end in ((io.bind_input, f"past_{part}"), (io.bind_output, f"present_{part}")):
            bind(end, "cpu", 0, np.uint8, buffer.shape, buffer.ctypes.data)
    io.bind_output("output")
    session.run_with_iobinding(io)
    for i, part in enumerate(("key", "value"), 1):
        np.testing.assert_array_equal(buffers[part], expected[i])
        untouched = [p for p in range(buffers[part].shape[2]) if p not in (11, 12)]
        np.testing.assert_array_equal(buffers[part][:, :, untouched], node.inputs[f"past_{part}"][:, :, untouched])
    np.testing.assert_allclose(io.get_outputs()[2].numpy(), expected[0], atol=1e-5 * np.abs(expected[0]).max())


def test_a_buffer_that_is_too_short_to_share(attention_node: Callable[..., Any], open_node: Callable[..., Any]) -> None:
    node = attention_node("KVAttention", past=11, tokens=2)
    session = open_node(node.proto(shapes=False))
    buffer = node.inputs["past_key"].copy()
    io = session.io_binding()
    for feed, array in node.feeds().items():
        io.bind_cpu_input(feed, array)
    io.bind_input("past_key", "cpu", 0, np.uint8, buffer.shape, buffer.ctypes.data)
    io.bind_output("present_key", "cpu", 0, np.uint8, buffer.shape, buffer.ctypes.data)
    for other in ("output", "present_value"):
        io.bind_output(other)
    with pytest.raises(Exception, match=r"present_key|shape"):
        session.run_with_iobinding(io)
    np.testing.assert_array_equal(buffer, node.inputs["past_key"])


def test_interleaving_may_have_its_output_where_its_input_is(open_node: Callable[..., Any]) -> None:
    """Hadamard may write in place, and each of its outputs is of channels from everywhere."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 192]) for n in ("x", "y"))
    nodes = [
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Hadamard", ["n"], ["h"], domain="bdq", size=64, interleave=3),
        helper.make_node("Neg", ["h"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bdq", VERSION)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=10)
    value = np.random.default_rng(0).standard_normal((4, 192)).astype(np.float32)
    (found,) = open_node(model).run(None, {"x": value})
    np.testing.assert_array_equal(found, hadamard(value, 64, 3))


def test_an_input_that_others_read_is_not_overwritten(open_node: Callable[..., Any]) -> None:
    """Hadamard may write in place: not where its input is read again."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4, 64]) for n in ("x", "y"))
    nodes = [
        helper.make_node("Neg", ["x"], ["n"]),
        helper.make_node("Hadamard", ["n"], ["h"], domain="bdq", size=64),
        helper.make_node("Hadamard", ["h"], ["back"], domain="bdq", size=64),
        helper.make_node("Add", ["back", "n"], ["y"]),
    ]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("bdq", VERSION)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=10)
    value = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    (found,) = open_node(model).run(None, {"x": value})
    np.testing.assert_allclose(found, -2 * value, atol=1e-4)


@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_weights_in_a_file_need_no_alignment(linear_node: Callable[..., Any], tmp_path: Path, shift: int) -> None:
    node = linear_node("HadamardLowBitLinearBias", 3, 64, 20)
    proto = node.proto()
    with (tmp_path / "model.onnx.data").open("wb") as data:
        data.write(b"\0" * shift)
        for tensor in proto.graph.initializer:
            raw = numpy_helper.to_array(tensor).tobytes()
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "model.onnx.data"), ("offset", data.tell()), ("length", len(raw))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            data.write(raw + b"\0")
    onnx.save(proto, tmp_path / "model.onnx")
    session: ort.InferenceSession = create_session(tmp_path / "model.onnx", threads=1, use_library=True)
    np.testing.assert_array_equal(session.run(None, node.feeds())[0], node.reference()[0])
