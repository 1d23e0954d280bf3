"""Each row describes exactly the modules that transformers builds for that family."""

from __future__ import annotations

import pytest
import torch

from bdq_models import Builder, Side, get_architecture, split_rows, supported

FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")


@pytest.fixture(params=FAMILIES)
def tiny(request, tiny_model):
    return tiny_model(request.param)


def test_supported():
    assert supported() == ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text")


def test_rows_name_every_weight_with_its_size(tiny):
    """Canonical weights of the torch model = embedding, norms, linears (and biases) of the row; sizes agree."""
    row, sizes = tiny.architecture, tiny.dimensions
    expected = {
        f"{row.embedding}.weight": (sizes.vocab_size, sizes.hidden_size),
        f"{row.final_norm}.weight": (sizes.hidden_size,),
    }
    if not sizes.tied:
        expected[f"{row.lm_head}.weight"] = (sizes.vocab_size, sizes.hidden_size)
    for layer in range(sizes.layers):
        for norm in row.norms:
            expected[f"{row.layer_path(layer, norm)}.weight"] = (sizes.output_size(norm),)
        for path in row.linears:
            name = row.layer_path(layer, path)
            expected[f"{name}.weight"] = (sizes.output_size(path), sizes.input_size(path))
            if f"{name}.bias" in tiny.weights:
                expected[f"{name}.bias"] = (sizes.output_size(path),)
    assert {name: tuple(weight.shape) for name, weight in tiny.weights.items()} == expected


def test_edges_are_consistent(tiny):
    row, sizes = tiny.architecture, tiny.dimensions
    assert [edge.name for edge in row.edges] == ["attention_in", "value", "key_query", "mlp_in", "mlp_middle"]
    for edge in row.edges:
        for path in (*edge.producers, *edge.consumers):
            assert path in row.linears or row.is_norm(path)
        assert {sizes.output_size(path) for path in edge.producers} == {sizes.free_channels(edge)}
        if edge.consumer_side is Side.INPUT:
            assert len({sizes.input_size(path) for path in edge.consumers}) == 1
    readers = [path for _, paths in row.residual_readers for path in paths]
    assert sorted((*readers, *row.residual_writers)) == sorted(row.linears)
    assert row.edge("value").name == "value"
    with pytest.raises(LookupError, match="no edge 'elbow'; it has"):
        row.edge("elbow")


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_packed(family, tiny_model):
    tiny = tiny_model(family)
    row, sizes = tiny.architecture, tiny.dimensions
    if family == "llama":
        assert row.packed_into("self_attn.q_proj") is None
        with pytest.raises(LookupError, match=r"no packed linear 'self_attn\.qkv_proj'"):
            split_rows(row, sizes, "self_attn.qkv_proj")
        return
    assert row.packed_into("mlp.up_proj") == "mlp.gate_up_proj"
    assert split_rows(row, sizes, "self_attn.qkv_proj") == (
        ("self_attn.q_proj", 0, 64),
        ("self_attn.k_proj", 64, 96),
        ("self_attn.v_proj", 96, 128),
    )


def test_norm_offset_is_what_transformers_adds(tiny_model):
    """A gain of zero on every norm of a block: Gemma stores -1 for it."""
    from bdq_export.float_model import load_float_model

    for family, offset in (("llama", 0.0), ("gemma3", 1.0)):
        tiny = tiny_model(family)
        assert tiny.architecture.norm_offset == offset
        name = f"{tiny.architecture.final_norm}.weight"
        tiny.weights[name] = torch.full_like(tiny.weights[name], -offset)
        logits = load_float_model(tiny, tiny.weights)(torch.tensor([[1, 2, 3]])).logits
        assert logits.abs().amax().item() == 0


def test_gemma3_needs_its_own_treatment():
    row = get_architecture({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]})
    assert not row.residual_rotation
    assert row.builder is Builder.DYNAMO


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "t5", "architectures": ["LlamaForCausalLM"]},
        {"architectures": []},
        {"model_type": ["llama"], "architectures": "LlamaForCausalLM"},
        {},
    ],
)
def test_unknown_family(config):
    with pytest.raises(LookupError, match=r"is not supported; supported: llama \(LlamaForCausalLM\), mistral"):
        get_architecture(config)


def test_class_or_type_alone_is_enough():
    assert get_architecture({"model_type": "phi3"}).name == "phi3"
    assert get_architecture({"architectures": ["Qwen2ForCausalLM"]}).name == "qwen2"
