"""genai_config.json: exactly the keys that genai's own builder writes, and the right special tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bdq_export.errors import InvalidInputError
from bdq_export.package.genai_config import SpecialTokens, genai_config, special_tokens
from bdq_models import Dimensions

# the file that onnxruntime-genai 0.18's builder writes for a llama; its parser throws at any other key
KEYS = {
    "": {"model", "search"},
    "model": {
        "bos_token_id",
        "context_length",
        "decoder",
        "eos_token_id",
        "pad_token_id",
        "type",
        "vocab_size",
    },
    "decoder": {
        "session_options",
        "filename",
        "head_size",
        "hidden_size",
        "inputs",
        "outputs",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
    },
    "session_options": {"log_id", "provider_options"},
    "inputs": {"input_ids", "attention_mask", "past_key_names", "past_value_names"},
    "outputs": {"logits", "present_key_names", "present_value_names"},
    "search": {
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beams",
        "num_return_sequences",
        "past_present_share_buffer",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
    },
}
TOKENS = SpecialTokens(1, (2,), 2)
INPUTS = ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]


@pytest.fixture
def dimensions(make_tiny_config: Callable[..., dict[str, Any]]) -> Dimensions:
    return Dimensions.from_config(make_tiny_config("llama", max_position_embeddings=8192))


def test_keys_are_those_of_genai(dimensions: Dimensions) -> None:
    config = genai_config("llama", dimensions, TOKENS, {}, "out.onnx", INPUTS)
    found = {"": config, **config, **config["model"], **config["model"]["decoder"]}
    for name, keys in KEYS.items():
        assert set(found[name]) == keys, name


def test_values(dimensions: Dimensions) -> None:
    config = genai_config("llama", dimensions, TOKENS, {}, "out.onnx", INPUTS)
    decoder = config["model"]["decoder"]
    assert decoder["filename"] == "out.onnx"
    assert (decoder["num_attention_heads"], decoder["num_key_value_heads"], decoder["head_size"]) == (9, 3, 16)
    assert config["model"]["context_length"] == 8192
    assert config["search"]["max_length"] == 4096
    assert config["search"]["past_present_share_buffer"] is True
    assert config["model"]["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "llama"),
        ("mistral", "mistral"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("phi3", "phi3"),
        ("gemma3_text", "gemma3_text"),
        ("something_new", "decoder"),
    ],
)
def test_type(dimensions: Dimensions, family: str, kind: str) -> None:
    assert genai_config(family, dimensions, TOKENS, {}, "m.onnx", INPUTS)["model"]["type"] == kind


def test_position_ids_only_when_the_graph_has_them(dimensions: Dimensions) -> None:
    config = genai_config("llama", dimensions, TOKENS, {}, "m.onnx", [*INPUTS, "position_ids"])
    assert config["model"]["decoder"]["inputs"]["position_ids"] == "position_ids"


def test_short_context_caps_max_length(make_tiny_config: Callable[..., dict[str, Any]]) -> None:
    small = Dimensions.from_config(make_tiny_config("llama", max_position_embeddings=256))
    assert genai_config("llama", small, TOKENS, {}, "m.onnx", INPUTS)["search"]["max_length"] == 256


def test_search_follows_generation_config(dimensions: Dimensions) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": None, "top_p": "0.9", "num_beams": True}
    search = genai_config("llama", dimensions, TOKENS, generation, "m.onnx", INPUTS)["search"]
    assert (search["do_sample"], search["temperature"]) == (True, 0.6)
    assert (search["top_k"], search["top_p"], search["num_beams"]) == (50, 1.0, 1)


def test_op_library_is_a_bare_name(dimensions: Dimensions) -> None:
    config = genai_config("llama", dimensions, TOKENS, {}, "m.onnx", INPUTS, "libbdq.so")
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == "libbdq.so"
    with pytest.raises(ValueError, match="bare file name"):
        genai_config("llama", dimensions, TOKENS, {}, "m.onnx", INPUTS, "../libbdq.so")


def test_special_tokens() -> None:
    config = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    assert special_tokens(config, {}, None) == SpecialTokens(1, (2,), 2)
    assert special_tokens(config, {"eos_token_id": [7, 8], "pad_token_id": [3]}, None) == SpecialTokens(1, (7, 8), 3)
    assert special_tokens(config, {}, 5).eos == (2, 5), "a chat model's end of turn, missing in config.json"
    assert special_tokens({}, {}, 5) == SpecialTokens(1, (5,), 5)
    assert special_tokens({"bos_token_id": 0, "eos_token_id": 0}, {}, None) == SpecialTokens(0, (0,), 0)
    with pytest.raises(InvalidInputError, match="never stop"):
        special_tokens({"bos_token_id": 1}, {}, None)


def test_several_ends_are_a_list_and_pad_stays_one_number(dimensions: Dimensions) -> None:
    model = genai_config("llama", dimensions, SpecialTokens(1, (2, 5), 2), {}, "m.onnx", INPUTS)["model"]
    assert model["eos_token_id"] == [2, 5]
    assert model["pad_token_id"] == 2
