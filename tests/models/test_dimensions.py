"""Sizes come from config.json with the defaults of transformers; nonsense is refused."""

from __future__ import annotations

import pytest

from bdq_models import Dimensions

FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")


def test_smollm2():
    config = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    assert Dimensions.from_config(config) == Dimensions(
        hidden_size=576,
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=49152,
        tied=True,
        rotary_dim=64,
        context_length=8192,
        sliding_window=None,
    )
    assert Dimensions.from_config(config).group == 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropped", ["head_dim", "num_key_value_heads", "tie_word_embeddings", "sliding_window"])
def test_defaults_are_those_of_transformers(family, dropped, make_tiny_config):
    from transformers import AutoConfig

    config = make_tiny_config(family)
    if dropped == "num_key_value_heads":
        config |= {"num_attention_heads": 32, "hidden_size": 288 if family == "llama" else 256}
    config.pop(dropped, None)
    values = {key: value for key, value in config.items() if key != "model_type"}
    theirs = AutoConfig.for_model(config["model_type"], **values)
    ours = Dimensions.from_config(config)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.tied == theirs.tie_word_embeddings
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)


def test_partial_rotary(make_tiny_config):
    assert Dimensions.from_config(make_tiny_config("phi3")).rotary_dim == 12
    nested = make_tiny_config("phi3", partial_rotary_factor=None)
    nested["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    assert Dimensions.from_config(nested).rotary_dim == 8
    # transformers' Llama rotates all channels whatever this key says.
    assert Dimensions.from_config(make_tiny_config("llama", partial_rotary_factor=0.5)).rotary_dim == 16


def test_sliding_window_only_where_it_is_used(make_tiny_config):
    assert Dimensions.from_config(make_tiny_config("mistral")).sliding_window == 8
    assert Dimensions.from_config(make_tiny_config("mistral", sliding_window=None)).sliding_window is None
    assert Dimensions.from_config(make_tiny_config("qwen2", sliding_window=8)).sliding_window is None
    used = make_tiny_config("qwen2", sliding_window=8, use_sliding_window=True)
    assert Dimensions.from_config(used).sliding_window == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None, expected a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"vocab_size": 3.5}, r"vocab_size is 3\.5"),
        ({"num_key_value_heads": 2}, "9 attention heads are no multiple of 2 key/value heads"),
        ({"num_attention_heads": -9}, "num_attention_heads is -9"),
        ({"head_dim": 15}, "15 rotary channels in a head of 15, expected an even number"),
    ],
)
def test_nonsense(changes, message, make_tiny_config):
    with pytest.raises(ValueError, match=message):
        Dimensions.from_config(make_tiny_config("llama", **changes))


@pytest.mark.parametrize("factor", [0, -0.5, 1.5, "half", True])
def test_nonsense_rotary_factor(factor, make_tiny_config):
    with pytest.raises(ValueError, match="partial_rotary_factor is"):
        Dimensions.from_config(make_tiny_config("phi3", partial_rotary_factor=factor))


def test_unknown_role(make_tiny_config):
    with pytest.raises(LookupError, match="no known module of a decoder layer"):
        Dimensions.from_config(make_tiny_config("llama")).output_size("self_attn.rotary_emb")
