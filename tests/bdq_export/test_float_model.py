"""The float model computes what transformers' own loader computes, over tensors it does not copy."""

from __future__ import annotations

import pytest
import torch

from bdq_export.errors import InvalidInputError
from bdq_export.float_model import load_float_model, locate_linear, replace_weights

FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
TOKENS = torch.arange(3, 51).reshape(2, 24)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_as_from_pretrained(family, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    assert not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="sdpa")
    assert torch.equal(logits(model), logits(theirs))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tensors_are_shared(family, tiny_model):
    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    for name, weight in tiny.weights.items():
        assert model.get_parameter(name).data_ptr() == weight.data_ptr()
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == tiny.dimensions.tied


def test_lm_head_unties(tiny_model):
    tiny = tiny_model("llama")
    head = torch.randn(320, 144)
    model = load_float_model(tiny, {**tiny.weights, "lm_head.weight": head})
    assert model.lm_head.weight.data_ptr() == head.data_ptr()
    assert model.config.tie_word_embeddings is False
    assert tiny.config["tie_word_embeddings"] is True


@pytest.mark.parametrize("family", FAMILIES)
def test_replace_weights_equals_a_fresh_load(family, tiny_model):
    first, second = tiny_model(family, seed=0), tiny_model(family, seed=1)
    model = load_float_model(first, first.weights)
    before = logits(model)
    replace_weights(model, first.architecture, second.weights)
    assert torch.equal(logits(model), logits(load_float_model(second, second.weights)))
    assert not torch.equal(logits(model), before)
    # The tensors of the first model are shared with others: replacing must not write into them.
    assert torch.equal(logits(load_float_model(first, first.weights)), before)


def test_replace_part_of_a_packed_linear(tiny_model):
    tiny = tiny_model("phi3")
    model = load_float_model(tiny, tiny.weights)
    name = "model.layers.1.self_attn.k_proj.weight"
    changed = {**tiny.weights, name: torch.randn_like(tiny.weights[name])}
    replace_weights(model, tiny.architecture, {name: changed[name]})
    assert torch.equal(logits(model), logits(load_float_model(tiny, changed)))


def test_replace_keeps_ties(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    embedding = torch.randn(320, 144)
    replace_weights(model, tiny.architecture, {"model.embed_tokens.weight": embedding})
    assert model.lm_head.weight.data_ptr() == embedding.data_ptr()
    replace_weights(model, tiny.architecture, {"lm_head.weight": torch.randn(320, 144)})
    replace_weights(model, tiny.architecture, {"model.embed_tokens.weight": torch.randn(320, 144)})
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_locate_linear(family, tiny_model):
    """Running the located rows of the module gives the logical linear's output."""
    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    for role in tiny.architecture.linears:
        path = f"model.layers.2.{role}"
        place = locate_linear(tiny.architecture, tiny.dimensions, path)
        rows = model.get_submodule(place.module).weight[place.start : place.stop]
        assert torch.equal(rows, tiny.weights[f"{path}.weight"])
    head = locate_linear(tiny.architecture, tiny.dimensions, "lm_head")
    assert (head.module, head.start, head.stop) == ("lm_head", 0, 320)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.qkv_proj", "model.norm", "layers.0.mlp.up_proj"])
def test_locate_no_linear(path, tiny_model):
    tiny = tiny_model("phi3")
    with pytest.raises(LookupError, match="is no linear of phi3"):
        locate_linear(tiny.architecture, tiny.dimensions, path)


def test_missing_unknown_and_misshapen_weights(tiny_model):
    tiny = tiny_model("qwen2")
    name = "model.layers.0.self_attn.o_proj.weight"
    short = {key: value for key, value in tiny.weights.items() if key != name}
    with pytest.raises(InvalidInputError, match=r"1 weights are missing, the first is .*o_proj\.weight"):
        load_float_model(tiny, short)
    with pytest.raises(InvalidInputError, match=r"weight model\.elbow does not belong to a qwen2 model"):
        load_float_model(tiny, {**tiny.weights, "model.elbow": torch.ones(1)})
    with pytest.raises(InvalidInputError, match=r"weights do not fit config\.json: .*o_proj"):
        load_float_model(tiny, {**tiny.weights, name: torch.ones(3, 3)})


def test_invalid_config(tiny_model):
    tiny = tiny_model("qwen2")
    tiny.config["num_attention_heads"] = "many"
    with pytest.raises(InvalidInputError, match=r"config\.json is not valid for qwen2: .*num_attention_heads"):
        load_float_model(tiny, tiny.weights)
