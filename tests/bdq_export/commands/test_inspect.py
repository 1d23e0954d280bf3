"""`bdq inspect`: sizes add up, roles are told apart, and the executed precision is said plainly."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

from bdq_export.commands.inspect import InspectResult, inspect, render
from bdq_export.errors import InvalidInputError


def shown(found: InspectResult, width: int) -> set[str]:
    """The cells of the tables on a terminal of `width` columns."""
    console = Console(width=width, file=io.StringIO())
    console.print(render(found))
    return {cell.strip() for line in console.file.getvalue().splitlines() for cell in re.split("[│┃]", line)}


def quantized_graph(
    folder: Path, level: int, metadata: dict[str, str], bits: int = 4, zero_points: bool = False
) -> Path:
    """An embedding shared with the output (tied), and one linear between them."""
    blob = 32 * bits // 8
    arrays = {
        "table": np.zeros((96, 2, blob), np.uint8),
        "table_scales": np.ones((96, 2), np.float32),
        "gain": np.ones(64, np.float32),
        "w": np.zeros((64, 2, blob), np.uint8),
        "w_scales": np.ones((64, 2), np.float16),
        "w_zero": np.zeros((64, 1), np.uint8),
    }
    attributes: dict[str, Any] = {
        "domain": "com.microsoft",
        "bits": bits,
        "block_size": 32,
        "K": 64,
        "accuracy_level": level,
    }
    w_inputs = ["h", "w", "w_scales32", *(["w_zero"] if zero_points else [])]
    nodes = [
        helper.make_node("Reshape", ["table", "flat"], ["rows"]),
        helper.make_node(
            "GatherBlockQuantized", ["rows", "ids", "table_scales"], ["x"], domain="com.microsoft", block_size=32
        ),
        helper.make_node("RMSNormalization", ["x", "gain"], ["h"]),
        helper.make_node("Cast", ["w_scales"], ["w_scales32"], to=TensorProto.FLOAT),
        helper.make_node("MatMulNBits", w_inputs, ["y"], "layer.q_proj", N=64, **attributes),
        helper.make_node("MatMulNBits", ["y", "table", "table_scales"], ["logits"], "lm_head", N=96, **attributes),
    ]
    weights = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    weights.append(numpy_helper.from_array(np.array([96, -1], np.int64), "flat"))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 96])
    graph = helper.make_graph(nodes, "g", [ids], [logits], weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, metadata)
    file = folder / "model.onnx"
    onnx.save(model, file, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return file


def test_roles_and_sizes(tmp_path: Path) -> None:
    found = inspect(quantized_graph(tmp_path, 4, {"bdq.scheme": "w4a16", "other": "x"}, zero_points=True))
    assert found.role_bytes == {
        "embedding and lm_head": 96 * 32,
        "linears": 64 * 32,
        "scales": 96 * 2 * 4 + 64 * 2 * 2,
        "norms": 64 * 4,
        "zero points": 64,
        "other": 16,
    }
    assert found.file_bytes == {n: (tmp_path / n).stat().st_size for n in ("model.onnx", "model.onnx.data")}
    assert sum(found.role_bytes.values()) <= found.file_bytes["model.onnx.data"]
    assert found.ops["com.microsoft::MatMulNBits"] == 2
    assert found.opsets == {"ai.onnx": 23, "com.microsoft": 1}
    assert (found.scheme, found.derived) == ("w4a16", False)
    assert found.metadata["other"] == "x"
    assert found.op_library == "not needed: stock operators only"
    assert json.loads(json.dumps(found.to_dict()))["precisions"][0]["executed"] == "w4a8"
    assert {"com.microsoft::MatMulNBits", "embedding and lm_head", "model.onnx.data"} <= shown(found, 120)


@pytest.mark.parametrize(("level", "executed", "word"), [(4, "w8a8", "int8 inside the kernel"), (0, "w8a16", "float")])
def test_executed_precision(tmp_path: Path, level: int, executed: str, word: str) -> None:
    found = inspect(quantized_graph(tmp_path, level, {}, bits=8))
    (group,) = found.precisions
    assert (group.op, group.count, group.weight_bits, group.block_size) == ("MatMulNBits", 2, 8, 32)
    assert (group.executed, group.symmetric) == (executed, True)
    assert word in group.note
    assert (found.scheme, found.derived) == ("w8a16", True)


def test_float_model(tiny_decoder: Callable[..., Path]) -> None:
    found = inspect(tiny_decoder())
    assert found.scheme == "float32"
    assert found.precisions[0].executed == "w32a32"
    assert found.role_bytes["embedding"] == found.role_bytes["lm_head"] == 264 * 64 * 4
    assert found.role_bytes["norms"] == 5 * 64 * 4
    assert found.role_bytes["rotary tables"] == 2 * 256 * 8 * 4


def test_static_integers_are_told_from_dynamic(tmp_path: Path) -> None:
    scalars = {"s": np.float32(0.1), "zx": np.uint8(128), "zw": np.int8(0)}
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in scalars.items()]
    weights.append(numpy_helper.from_array(np.zeros((8, 8), np.int8), "w"))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zx"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "zx"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "s", "zw"], ["wd"]),
        helper.make_node("MatMul", ["xd", "wd"], ["y"], "q_proj"),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    x, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in ("x", "z"))
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [z], weights), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.save(model, tmp_path / "model.onnx")
    found = inspect(tmp_path)
    assert (found.scheme, found.precisions[0].executed) == ("w8a8", "w8a8")
    assert "scales fixed at export" in found.precisions[0].note
    assert found.role_bytes["linears"] == 64


def test_bad_files(tmp_path: Path) -> None:
    file = quantized_graph(tmp_path, 4, {})
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(InvalidInputError, match=r"data file .*model\.onnx\.data is missing"):
        inspect(file)
    for content in (b"no model", b"", b"\xff" * 50):
        file.write_bytes(content)
        with pytest.raises(InvalidInputError, match="is not an ONNX model"):
            inspect(file)
    with pytest.raises(InvalidInputError, match="does not exist"):
        inspect(tmp_path / "none")


def test_without_onnx_it_says_what_to_install(tmp_path: Path) -> None:
    file = quantized_graph(tmp_path, 4, {})
    code = "import sys; sys.modules['onnx'] = None\n"
    code += f"from bdq_export.commands.inspect import inspect\ninspect({str(file)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert "MissingDependencyError" in done.stderr
    assert 'pip install "bdq-export[export]"' in done.stderr


def test_bdq_operators_say_what_they_compute(tmp_path: Path) -> None:
    linear = {"K": 64, "N": 32, "weight_bits": 3, "weight_grid": 1, "activation_bits": 4, "domain": "bdq"}
    attention = {"num_heads": 2, "kv_num_heads": 1, "head_size": 32, "key_bits": 4, "value_bits": 3, "scale": 0.1}
    arrays = {"w": np.zeros((2, 1, 384), np.uint8), "s": np.zeros((2, 1, 16), np.float16), "d": np.ones(64, np.float32)}
    nodes = [
        helper.make_node("HadamardLowBitLinear", ["x", "d", "w", "s"], ["y"], "q_proj", hadamard_size=64, **linear),
        helper.make_node(
            "KVAttention", ["x", "x", "x", "p", "p", "l", "t"], ["z", "k", "v"], domain="bdq", hadamard=1, **attention
        ),
    ]
    x, z = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "z"))
    weights = [numpy_helper.from_array(value, name) for name, value in arrays.items()]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("bdq", 2)]
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [z], weights), opset_imports=opsets, ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    found = inspect(tmp_path)
    (group,) = found.precisions
    assert (group.op, group.weight_bits, group.block_size, group.executed) == (
        "bdq::HadamardLowBitLinear",
        3,
        0,
        "w3a4",
    )
    assert "inputs rotated" in group.note
    assert "odd grid" in group.note
    (cache,) = found.caches
    assert (cache.op, cache.count, cache.key_bits, cache.value_bits, cache.hadamard) == (
        "bdq::KVAttention",
        1,
        4,
        3,
        True,
    )
    assert found.role_bytes["linears"] == 2 * 384
    assert found.role_bytes["online transforms"] == 64 * 4
    assert found.op_library.startswith(("found: version", "not found"))
    assert (found.scheme, found.derived) == ("w3a4", True)
    assert {"bdq::HadamardLowBitLinear", "bdq::KVAttention"} <= shown(found, 120)
    console = Console(width=80, file=io.StringIO())
    console.print(render(found))
    assert "…" not in console.file.getvalue(), "names of operators differ at their ends"
