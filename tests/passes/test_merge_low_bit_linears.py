"""Linears of one input become one operator, and compute the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import MergeLowBitLinearsPass
from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.functions import attach_functions
from bdq_passes.graph_edit import initializer
from bdq_runtime.packing import PerChannel, QuantSpec
from bdq_runtime.panels import pack_panels, pack_scales

K = 48
SIZES = (32, 16, 20)
Make = Callable[..., ir.Model]


@pytest.fixture
def siblings() -> Make:
    """Three linears of `x`, `attn.q`, `attn.k` and `attn.v`; keywords change attributes of the second one."""

    def make(*, online: bool = False, bias: bool = False, sizes: tuple[int, ...] = SIZES, **changes: Any) -> ir.Model:
        random = np.random.default_rng(0)
        x = ir.Value(name="x", shape=ir.Shape(["rows", K]), type=ir.TensorType(ir.DataType.FLOAT))
        model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="siblings"), ir_version=10)
        diagonal = changes.pop("diagonal", np.ones(K, np.float32))
        for index, (name, n) in enumerate(zip("qkv", sizes, strict=True)):
            codes, scales = random.integers(0, 16, (n, K), dtype=np.uint8), random.uniform(0.1, 1, (n, 1))
            arrays = {
                **({"diagonal": diagonal if index == 1 else np.ones(K, np.float32)} if online else {}),
                "weight": pack_panels(codes, 4),
                "scales": pack_scales(scales),
                **({"bias": random.standard_normal(n).astype(np.float32)} if bias else {}),
            }
            attributes = {"K": K, "N": n, "weight_bits": 4, "weight_grid": 0, "block_size": 0}
            attributes |= {"activation_bits": 4, "activation_clip": 0.9}
            attributes |= {"hadamard_size": 16, "hadamard_interleave": 3} if online else {}
            attributes |= changes if index == 1 else {}
            inputs = [x, *(initializer(model, f"{name}_{key}", array) for key, array in arrays.items())]
            operator = f"{'Hadamard' if online else ''}LowBitLinear{'Bias' if bias else ''}"
            node = bdq_node(model, operator, inputs, attributes, f"attn.{name}")
            note.set_role(node, note.LINEAR)
            note.set_parts(node, (f"attn.{name}",))
            note.set_spec(node, QuantSpec(4, PerChannel()))
            note.set_executed(node, "int8")
            output = node.outputs[0]
            output.name, output.type = name, x.type
            model.graph.append(node)
            model.graph.outputs.append(output)
        note.set_linear_count(model, len(sizes))
        return model

    return make


def _outputs(run: Any, model: ir.Model) -> list[Any]:
    attach_functions(model)
    x = np.random.default_rng(1).standard_normal((5, K)).astype(np.float32)
    return [run(model, {"x": x}) for model in _one_output_each(model)]


def _one_output_each(model: ir.Model) -> list[ir.Model]:
    found = []
    for index in range(len(model.graph.outputs)):
        copy = ir.from_proto(ir.to_proto(model))
        kept = copy.graph.outputs[index]
        copy.graph.outputs[:] = [kept]
        found.append(copy)
    return found


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_bits_by_one_linear(siblings: Make, run: Any, online: bool, bias: bool) -> None:
    expected = _outputs(run, siblings(online=online, bias=bias))
    model = siblings(online=online, bias=bias)
    assert MergeLowBitLinearsPass()(model).modified
    (linear,) = note.with_role(model, note.LINEAR)
    assert (linear.name, note.parts(linear)) == ("attn.q_k_v", ("attn.q", "attn.k", "attn.v"))
    assert linear.attributes["N"].as_int() == sum(SIZES)
    assert note.linear_count(model) == 1
    assert [value.name for value in model.graph.outputs] == list("qkv")
    assert {name.partition("_")[0] for name in model.graph.initializers}.isdisjoint("kv")  # nor of q, but a diagonal
    for one, other in zip(_outputs(run, model), expected, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not MergeLowBitLinearsPass()(model).modified


@pytest.mark.parametrize(
    "changes", [{"activation_clip": 0.8}, {"diagonal": np.full(K, 2, np.float32)}, {"hadamard_interleave": 1}]
)
def test_linears_that_differ_are_left_alone(siblings: Make, changes: dict[str, Any]) -> None:
    model = siblings(online=True, **changes)
    assert not MergeLowBitLinearsPass()(model).modified
    assert len(list(note.with_role(model, note.LINEAR))) == 3


def test_what_fits_is_merged(siblings: Make) -> None:
    """The panels of one may be half empty only at the end."""
    model = siblings(sizes=(20, 16, 32))
    assert MergeLowBitLinearsPass()(model).modified
    assert [node.name for node in note.with_role(model, note.LINEAR)] == ["attn.q", "attn.k_v"]
