"""config.json: every kind of model that cannot be exported and every bad value is refused by name."""

from __future__ import annotations

import json

import pytest

from bdq_export.checkpoint import open_checkpoint
from bdq_export.checkpoint.config_file import read_config
from bdq_export.errors import InvalidInputError, UnsupportedModelError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ("mamba", "llama", "gemma3_text")),
        ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSequenceClassification", "llama")),
        ({"auto_map": {"AutoModel": "x.Y"}}, ("auto_map", "never run", "llama")),
        ({"trust_remote_code": True}, ("trust_remote_code", "never run")),
        ({"is_encoder_decoder": True, "model_type": "t5"}, ("encoder-decoder", "llama")),
        ({"vision_config": {"hidden_size": 8}}, ("vision_config", "multimodal")),
        ({"text_config": {"hidden_size": 8}}, ("multimodal",)),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ("already quantized", "gptq", "original")),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, ("rope_parameters", "dynamic", "llama3")),
        ({"rope_scaling": {"type": "longrope"}}, ("longrope",)),
        ({"rope_parameters": {"full_attention": {"rope_type": "odd"}}}, ("rope_parameters.full_attention", "odd")),
    ],
)
def test_unsupported(model_dir, edit_json, refused, changes, words):
    directory = model_dir()
    edit_json(directory / "config.json", **changes)
    refused(directory, UnsupportedModelError, "config.json", *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": -64}, ("hidden_size", "-64", "from 1 to")),
        ({"hidden_size": 1 << 63}, ("hidden_size",)),
        ({"hidden_size": "64"}, ("hidden_size", "'64'")),
        ({"hidden_size": True}, ("hidden_size", "True")),
        ({"hidden_size": 64.0}, ("hidden_size",)),
        ({"num_hidden_layers": 10**6}, ("num_hidden_layers",)),
        ({"num_attention_heads": 5}, ("5 attention heads", "multiple")),
        ({"num_attention_heads": 9, "head_dim": None, "hidden_size": 145}, ("145", "multiple")),
        ({"vocab_size": None}, ("vocab_size",)),
        ({"head_dim": 15}, ("15",)),
        ({"rms_norm_eps": 0}, ("rms_norm_eps",)),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
        ({"tie_word_embeddings": "yes"}, ("tie_word_embeddings", "'yes'")),
        ({"attention_bias": 1}, ("attention_bias",)),
        ({"rope_theta": -1.0}, ("rope_theta",)),
        ({"rope_scaling": "linear"}, ("rope_scaling", "object")),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, ("rope_scaling.factor",)),
        ({"eos_token_id": [1, 100_000]}, ("eos_token_id", "320")),
        ({"bos_token_id": 1.5}, ("bos_token_id",)),
        ({"architectures": "LlamaForCausalLM"}, ("architectures", "list")),
        ({"architectures": [{}]}, ("architectures", "list")),
        ({"model_type": 3}, ("model_type",)),
    ],
)
def test_bad_value(model_dir, edit_json, refused, changes, words):
    directory = model_dir()
    edit_json(directory / "config.json", **changes)
    refused(directory, InvalidInputError, "config.json", *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"hidden_size: 64", "not valid JSON"),
        (b"[]", "object"),
        (b"\xef\xbb\xbf{}", "byte-order mark"),
        (b"\xff\xfe{\0}\0", "byte-order mark"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": 1, "a": 2}', "'a' twice"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": 1e999}', "hidden_size"),
        (b'{"a":' * 10_000 + b"1" + b"}" * 10_000, "nested"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "' + b"x" * 5_000_000 + b'"}', "bytes"),
    ],
)
def test_bad_json(model_dir, refused, text, words):
    directory = model_dir()
    if b"1e999" in text:
        text = b'{"hidden_size": 1e999}'
    (directory / "config.json").write_bytes(text)
    refused(directory, InvalidInputError, "config.json", words)


def test_code_choosing_keys_are_left_out(model_dir, edit_json):
    """transformers would download a kernel that `attn_implementation` names."""
    directory = model_dir()
    edit_json(directory / "config.json", attn_implementation="someone/kernel", _attn_implementation="x")
    assert not {"attn_implementation", "_attn_implementation"} & set(open_checkpoint(directory).config)


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "phi3", "gemma3"])
def test_what_transformers_writes_is_accepted(family, tmp_path, make_tiny_config):
    """Both spellings: ours, and transformers' own with all its defaults."""
    from transformers import AutoConfig

    config = make_tiny_config(family)
    AutoConfig.for_model(**config).save_pretrained(tmp_path)
    saved = read_config(tmp_path / "config.json")
    assert saved["hidden_size"] == config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path / "config.json") == config
