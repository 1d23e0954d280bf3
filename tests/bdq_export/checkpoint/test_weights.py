"""Canonical weights: equal to what was saved, mapped where they can be, finite, and packed again exactly."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdq_export.checkpoint import open_checkpoint, to_checkpoint_names
from bdq_export.errors import InvalidInputError
from bdq_export.scratch import Scratch

FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_back(family, model_dir, tiny_model):
    directory = model_dir(family)
    checkpoint = open_checkpoint(directory)
    weights, expected = checkpoint.weights(), tiny_model(family).weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    stored = load_file(directory / "model.safetensors")
    again = to_checkpoint_names(checkpoint.architecture, weights)
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[name], stored[name]) for name in stored)


@pytest.mark.parametrize("family", FAMILIES)
def test_expected_shapes_are_those_of_transformers(family, model_dir):
    from transformers import AutoConfig, AutoModelForCausalLM

    from bdq_export.checkpoint.expected import expected_shapes

    checkpoint = open_checkpoint(model_dir(family))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert expected_shapes(checkpoint.architecture, checkpoint.dimensions, checkpoint.config) == theirs


def test_float32_is_mapped_not_copied(model_dir):
    """All tensors lie in one storage, the mapped file, parts of packed linears too."""
    checkpoint = open_checkpoint(model_dir("phi3"))
    weights = checkpoint.weights()
    size = (checkpoint.directory / "model.safetensors").stat().st_size
    whole = [tensor.data_ptr() for tensor in weights.values()]
    assert max(whole) - min(whole) < size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, model_dir, tiny_model):
    checkpoint = open_checkpoint(model_dir("llama", dtype=dtype))
    weights, expected = checkpoint.weights(), tiny_model("llama").weights
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name].to(dtype).float())
    assert checkpoint.tensor("model.norm.weight").dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_lazy_weights_are_the_same(family, dtype, model_dir, tmp_path):
    checkpoint = open_checkpoint(model_dir(family, dtype=dtype))
    weights, lazy = checkpoint.weights(), checkpoint.lazy_weights(Scratch(tmp_path))
    assert list(lazy) == list(weights)
    assert len(lazy) == len(weights)
    for name, tensor in weights.items():
        assert lazy[name].dtype == torch.float32
        assert torch.equal(lazy[name], tensor)
        assert lazy.shape(name) == tensor.shape
        assert name in lazy


def test_lazy_weights_keep_no_layer(model_dir, tmp_path):
    """Tensors of layers are made anew each time; the embedding, which several models share, is not."""
    lazy = open_checkpoint(model_dir("llama", dtype=torch.bfloat16)).lazy_weights(Scratch(tmp_path))
    assert lazy["model.layers.0.mlp.up_proj.weight"] is not lazy["model.layers.0.mlp.up_proj.weight"]
    assert lazy["model.embed_tokens.weight"] is lazy["model.embed_tokens.weight"]


def change_value(directory, name, value):
    tensors = load_file(directory / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity(model_dir, refused, value, dtype):
    directory = model_dir(dtype=dtype)
    change_value(directory, "model.layers.2.self_attn.v_proj.weight", value)
    refused(directory, InvalidInputError, "model.layers.2.self_attn.v_proj.weight", "1 of", "NaN or infinite")


def test_both_infinities(model_dir, refused):
    directory = model_dir()
    change_value(directory, "model.norm.weight", float("inf"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][9] = float("-inf")
    save_file(tensors, directory / "model.safetensors")
    refused(directory, InvalidInputError, "model.norm.weight", "2 of 144")


def test_large_finite_values_pass(model_dir):
    """Their sum overflows float32, the values do not."""
    directory = model_dir()
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)
    save_file(tensors, directory / "model.safetensors")
    assert float(open_checkpoint(directory).weights()["model.norm.weight"][0]) == pytest.approx(3e38)


def test_tied_lm_head(model_dir, refused):
    directory = model_dir()
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(directory).weights()
    change_value(directory, "lm_head.weight", 0.5)
    refused(directory, InvalidInputError, "tie_word_embeddings", "lm_head.weight", "other values")
