"""What a float graph holds besides the right operators: views of the weights, and nothing of the machine."""

from __future__ import annotations

import collections
import getpass
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from bdq_export.builders import Builder, build_float_graph, check_float_graph
from bdq_export.builders.rope import rope_of_layers
from bdq_export.builders.weights import WeightSource
from bdq_export.errors import InvalidInputError, UnsupportedModelError
from bdq_export.float_model import load_float_model, transformers_config
from bdq_passes import annotations as note


@pytest.fixture(scope="module")
def llama(tiny_model: Any) -> Any:
    return tiny_model("llama")


def array(graph: ir.Model, name: str) -> Any:
    value = graph.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def test_weights_are_views_of_the_torch_tensors(llama: Any) -> None:
    graph = build_float_graph(llama, llama.weights)
    for path in ("model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj"):
        assert np.shares_memory(array(graph, f"{path}.weight"), llama.weights[f"{path}.weight"].numpy())
    embedding = llama.weights["model.embed_tokens.weight"].numpy()
    assert np.shares_memory(array(graph, "model.embed_tokens.weight"), embedding)
    assert np.shares_memory(array(graph, "lm_head.weight"), embedding)


def test_tied_lm_head_says_so_and_an_own_weight_unties_it(llama: Any) -> None:
    tied = build_float_graph(llama, llama.weights)
    heads = [node for node in tied.graph if node.name == "lm_head"]
    assert [note.tied(node) for node in heads] == ["model.embed_tokens.weight"]
    own = {**llama.weights, "lm_head.weight": llama.weights["model.embed_tokens.weight"] * -2.0}
    untied = build_float_graph(llama, own)
    assert [note.tied(node) for node in untied.graph if node.name == "lm_head"] == [None]
    np.testing.assert_array_equal(array(untied, "lm_head.weight"), own["lm_head.weight"].numpy().T)
    assert check_float_graph(untied, load_float_model(llama, own), llama.dimensions) < 1e-4


@pytest.mark.parametrize("builder", [Builder.MOBIUS, pytest.param(Builder.DYNAMO, marks=pytest.mark.slow)])
def test_bytes_are_the_same_each_time_and_name_nothing_of_this_machine(llama: Any, builder: Builder) -> None:
    first, second = (
        ir.to_proto(build_float_graph(llama, llama.weights, builder=builder)).SerializeToString(deterministic=True)
        for _ in range(2)
    )
    assert first == second
    onnx.checker.check_model(onnx.load_model_from_string(first), full_check=True)
    text = first.replace(b"\0", b"")
    paths = {os.getcwd(), str(Path.home()), tempfile.gettempdir(), str(Path(torch.__file__).parents[1])} - {"/"}
    for path in (*paths, "site-packages", "bdq-config-", ".py", *({getpass.getuser()} - {"root"})):
        assert path.encode() not in text, path
    assert b"stack_trace" not in text
    assert b"pkg." not in text


def test_missing_and_surplus_weights_are_refused(llama: Any) -> None:
    lost = {name: weight for name, weight in llama.weights.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(InvalidInputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        build_float_graph(llama, lost, builder=Builder.MOBIUS)
    surplus = {**llama.weights, "model.layers.0.self_attn.q_proj.bias": torch.zeros(llama.dimensions.hidden_size)}
    with pytest.raises(InvalidInputError, match=r"q_proj\.bias has no place in the graph"):
        build_float_graph(llama, surplus, builder=Builder.MOBIUS)


def test_gain_of_an_offset_norm_is_what_it_multiplies_by(tiny_model: Any) -> None:
    gemma = tiny_model("gemma3")
    name = "model.layers.1.post_feedforward_layernorm.weight"
    gain = WeightSource(gemma.architecture, gemma.weights).gain(name)
    np.testing.assert_array_equal(gain.numpy(), gemma.weights[name].numpy() + 1)


@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_rope_tables_equal_those_of_transformers(tiny_model: Any, family: str) -> None:
    tiny = tiny_model(family)
    rotary = load_float_model(tiny, tiny.weights).model.rotary_emb
    ropes = rope_of_layers(transformers_config(tiny, untied=False), tiny.dimensions.rotary_dim)
    assert sorted(ropes) == (["full_attention", "sliding_attention"] if family == "gemma3" else [""])
    for kind, rope in ropes.items():
        prefix = f"{kind}_" if kind else ""
        np.testing.assert_array_equal(rope.inverse_frequencies, getattr(rotary, f"{prefix}inv_freq").numpy())
        assert rope.scaling == getattr(rotary, f"{prefix}attention_scaling")


def test_rope_tables_are_folded_when_a_session_loads(llama: Any, tmp_path: Path) -> None:
    ir.save(build_float_graph(llama, llama.weights), tmp_path / "model.onnx")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    counts = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert counts["GroupQueryAttention"] == llama.dimensions.layers
    assert counts["Cos"] + counts["Sin"] + counts["Range"] == 0


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rope_that_depends_on_the_prompt_is_refused(llama: Any, rope_type: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8} if rope_type == "longrope" else {}
    scaled = replace(llama, config={**llama.config, "rope_parameters": rope | factors})
    with pytest.raises(UnsupportedModelError, match=f"rope_type '{rope_type}'.*supported: default, linear, llama3"):
        build_float_graph(scaled, llama.weights)


def test_rotary_part_that_the_operator_cannot_do_is_refused(tiny_model: Any) -> None:
    tiny = tiny_model("phi3", partial_rotary_factor=0.75)
    with pytest.raises(UnsupportedModelError, match="12 channels of each head are rotated"):
        build_float_graph(tiny, tiny.weights)


def test_outputs_that_nobody_reads_are_left_out(tiny_model: Callable[..., Any]) -> None:
    tiny = tiny_model("llama")
    graph = build_float_graph(tiny, tiny.weights).graph
    for node in graph:
        for value in node.outputs[1:]:
            assert (value.name == "") == (not value.uses() and not value.is_graph_output()), node.name
