"""The check of a float graph: it must see every kind of wrong graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_export.builders import build_float_graph, check_float_graph
from bdq_export.errors import VerificationError
from bdq_export.float_model import load_float_model


@pytest.fixture(scope="module")
def tiny(tiny_model: Any) -> Any:
    return tiny_model("mistral")


@pytest.fixture(scope="module")
def torch_model(tiny: Any) -> Any:
    return load_float_model(tiny, tiny.weights)


def scale_weight(graph: ir.Model) -> None:
    value = graph.graph.initializers["model.layers.1.mlp.down_proj.weight"]
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)


def swap_two_rows(graph: ir.Model) -> None:
    value = graph.graph.initializers["model.layers.2.self_attn.qkv_proj.weight"]
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array[:, [0, 1]] = array[:, [1, 0]]
    value.const_value = ir.Tensor(array, name=value.name)


def change_attention(name: str, value: ir.Attr) -> Callable[[ir.Model], None]:
    def change(graph: ir.Model) -> None:
        node = next(node for node in graph.graph if node.name == "model.layers.2.self_attn")
        node.attributes[name] = value

    return change


def lose_rope_in_the_cache(graph: ir.Model) -> None:
    node = next(node for node in graph.graph if node.name == "model.layers.0.self_attn")
    node.replace_input_with(7, node.inputs[8])


WRONG = {
    "scaled weight": scale_weight,
    "swapped rows": swap_two_rows,
    "scale": change_attention("scale", ir.AttrFloat32("scale", 0.2525)),
    "interleaved": change_attention("rotary_interleaved", ir.AttrInt64("rotary_interleaved", 1)),
    "rope": lose_rope_in_the_cache,
}


def test_right_graph_passes_and_is_left_as_it_was(tiny: Any, torch_model: Any) -> None:
    graph = build_float_graph(tiny, tiny.weights)
    before = ir.to_proto(graph).SerializeToString(deterministic=True)
    assert 0 < check_float_graph(graph, torch_model, tiny.dimensions, seed=1) < 1e-4
    assert ir.to_proto(graph).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_wrong_graph_is_refused_with_the_figure(wrong: Any, tiny: Any, torch_model: Any) -> None:
    graph = build_float_graph(tiny, tiny.weights)
    wrong(graph)
    with pytest.raises(VerificationError, match=r"logits are off by \d\S* of their standard deviation, expected at"):
        check_float_graph(graph, torch_model, tiny.dimensions)


@pytest.mark.parametrize("window", [9, -1, 7])
def test_wrong_window_is_refused(window: int, tiny: Any, torch_model: Any) -> None:
    graph = build_float_graph(tiny, tiny.weights)
    change_attention("local_window_size", ir.AttrInt64("local_window_size", window))(graph)
    with pytest.raises(VerificationError, match=rf"layer 2 .* attends to {window} tokens, expected 8"):
        check_float_graph(graph, torch_model, tiny.dimensions)


def test_weight_that_is_not_finite_is_refused(tiny: Any, torch_model: Any) -> None:
    graph = build_float_graph(tiny, tiny.weights)
    value = graph.graph.initializers["model.norm.weight"]
    value.const_value = ir.Tensor(np.full(tiny.dimensions.hidden_size, np.nan, np.float32), name=value.name)
    with pytest.raises(VerificationError, match="off by nan"):
        check_float_graph(graph, torch_model, tiny.dimensions)


def test_file_is_checked_by_its_path(tiny: Any, torch_model: Any, tmp_path: Path) -> None:
    graph = build_float_graph(tiny, tiny.weights)
    ir.save(graph, tmp_path / "right.onnx", external_data="right.onnx.data")
    scale_weight(graph)
    ir.save(graph, tmp_path / "wrong.onnx", external_data="wrong.onnx.data")
    assert check_float_graph(tmp_path / "right.onnx", torch_model, tiny.dimensions) < 1e-4
    with pytest.raises(VerificationError):
        check_float_graph(tmp_path / "wrong.onnx", torch_model, tiny.dimensions)
