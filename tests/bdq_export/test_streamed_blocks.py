"""A model that holds one block at a time computes what one that holds all computes, to the last bit."""

from __future__ import annotations

import pytest
import torch
from lazy import Lazy

from bdq_export.builders import build_float_graph
from bdq_export.calibration.writer import text_writer
from bdq_export.errors import InvalidInputError
from bdq_export.float_model import load_float_model, replace_weights
from bdq_export.quantize.rtn import rtn
from bdq_export.quantize.sequential import set_quantized
from bdq_export.streamed_blocks import held, load_block
from bdq_runtime.packing import PerBlock, QuantSpec

FAMILIES = ("llama", "llama_biases", "qwen3", "phi3", "gemma3")
LONG = ("llama_biases", "gemma3")
TOKENS = torch.arange(3, 51).reshape(2, 24)


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def loaded(model):
    return [not any(each.is_meta for each in block.parameters()) for block in model.model.layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_with_one_block(family, tiny_model):
    tiny = tiny_model(family)
    model = load_float_model(tiny, Lazy(tiny.weights))
    assert loaded(model) == [False, False, False]
    assert torch.equal(logits(model), logits(load_float_model(tiny, tiny.weights)))
    assert loaded(model) == [False, False, True]
    load_block(model, 1)
    assert loaded(model) == [False, True, False]


def test_a_block_is_read_once_for_many_batches(tiny_model):
    tiny = tiny_model("llama")
    weights = Lazy(tiny.weights)
    model = load_float_model(tiny, weights)
    logits(model)
    weights.read.clear()
    load_block(model, 1)
    with torch.inference_mode():
        for _ in range(3):
            load_block(model, 1)
    assert sorted(weights.read) == sorted(name for name in tiny.weights if name.startswith("model.layers.1."))


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_what_is_replaced_is_used_and_the_rest_stays(family, tiny_model):
    """Other float weights, then the quantized ones of one site and the embedding, then the first ones again."""
    tiny, other = tiny_model(family), tiny_model(family, seed=1)
    whole, streamed = load_float_model(tiny, tiny.weights), load_float_model(tiny, Lazy(tiny.weights))
    before = logits(whole)
    names = [f"model.layers.1.self_attn.{role}_proj.weight" for role in "qkv"]
    spec = QuantSpec(4, PerBlock(32))
    quantized = {name: rtn(other.weights[name], spec) for name in (*names, "model.embed_tokens.weight")}
    for model, weights in ((whole, other.weights), (streamed, Lazy(other.weights))):
        replace_weights(model, tiny.architecture, weights)
        assert not torch.equal(logits(model), before)
        load_block(model, 1)
        set_quantized(model, tiny.architecture, quantized)
    assert torch.equal(logits(streamed), logits(whole))
    replace_weights(streamed, tiny.architecture, Lazy(tiny.weights))
    assert torch.equal(logits(streamed), before)


def test_all_blocks_can_be_held(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, Lazy(tiny.weights))
    with held(model):
        assert loaded(model) == [True, True, True]
        found = logits(model)
    assert loaded(model) == [False, False, False]
    assert torch.equal(found, logits(load_float_model(tiny, tiny.weights)))


@pytest.mark.parametrize("family", ["llama_biases", "phi3"])
def test_blocks_can_be_held_without_some_weights(family, tiny_model):
    """Nobody reads those, not even of a block that had them before."""
    tiny = tiny_model(family)
    weights = Lazy(tiny.weights)
    model = load_float_model(tiny, weights)
    before = logits(model)
    left_out = {name for name in tiny.weights if name.endswith("_proj.weight") and ".layers." in name}
    kept = {name for name in tiny.weights if ".layers." in name} - left_out
    weights.read.clear()
    with held(model, without=left_out):
        assert sorted(weights.read) == sorted(kept)
        for block in model.model.layers:
            parameters = dict(block.named_parameters())
            assert all(each.is_meta == name.endswith("_proj.weight") for name, each in parameters.items())
    assert torch.equal(logits(model), before)


def test_weights_that_are_missing_besides_those_left_out(tiny_model):
    tiny = tiny_model("llama")
    weights = dict(tiny.weights)
    del weights["model.layers.1.input_layernorm.weight"]
    model = load_float_model(tiny, Lazy(weights))
    left_out = [name for name in weights if name.endswith("_proj.weight")]
    with (
        pytest.raises(InvalidInputError, match=r"^1 weights of layer 1 are missing .*input_layernorm"),
        held(model, left_out),
    ):
        pass


def test_gradients_go_through_blocks_that_were_loaded_without_them(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, Lazy(tiny.weights))
    logits(model)  # in inference mode
    embedded = model.model.embed_tokens(TOKENS).clone().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    assert embedded.grad is not None
    assert bool(embedded.grad.any())


@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "layer"])
def test_wrong_weights(change, tiny_model):
    tiny = tiny_model("llama")
    weights = dict(tiny.weights)
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unknown":
        weights["model.layers.1.mlp.side_proj.weight"] = weights[name]
    elif change == "shape":
        weights[name] = weights[name][:-1]
    else:
        weights["model.layers.7.mlp.up_proj.weight"] = weights[name]
    with pytest.raises(InvalidInputError, match=r"layer|mlp\.up_proj"):
        logits(load_float_model(tiny, Lazy(weights)))


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("fast", [True, False])
def test_the_writer_is_the_same(family, fast, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("bdq_export.calibration.writer.has_fast_bfloat16", lambda: fast)
    tiny = tiny_model(family)
    whole, model = load_float_model(tiny, tiny.weights), load_float_model(tiny, Lazy(tiny.weights, tmp_path))
    writer = text_writer(model)
    assert writer is not model
    assert torch.equal(logits(writer), logits(text_writer(whole)))
    assert writer.dtype == (torch.bfloat16 if fast else torch.float32)
    assert torch.equal(logits(model), logits(whole)), "the model itself is as it was"
    storages = {parameter.untyped_storage().data_ptr() for parameter in writer.parameters()}
    assert all(parameter.untyped_storage().data_ptr() not in storages for parameter in model.parameters())


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in FAMILIES]
)
def test_graphs_of_lazy_weights_are_the_same(family, tiny_model):
    changes = {"partial_rotary_factor": 1.0} if family == "phi3" else {}
    tiny = tiny_model(family, **changes)
    whole, lazy = (build_float_graph(tiny, weights) for weights in (tiny.weights, Lazy(tiny.weights)))
    found = lazy.graph.initializers
    assert found.keys() == whole.graph.initializers.keys()
    for name, value in whole.graph.initializers.items():
        tensor = found[name].const_value
        assert tuple(tensor.shape) == tuple(value.const_value.shape)
        assert (tensor.numpy() == value.const_value.numpy()).all(), name
