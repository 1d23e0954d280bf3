"""Tokenizers rebuilt from GGUF vocabularies split text as the originals do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bdq_export.checkpoint.gguf_file import GgufFile
from bdq_export.checkpoint.gguf_tokenizer import make_tokenizer, make_tokenizer_config, merges_by_score

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def sentencepiece(**changes):
    """A vocabulary as Gemma's: runs of spaces and newlines and a tag are user-defined."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>"]
    user = ["\n", "\n\n", "  ", "   ", "<b>"]
    # "the" beats "he" beats "th": the score decides, not the length or the order of ids.
    normal = ["▁", "t", "h", "e", "b", "<", ">", "th", "he", "the", "▁the"]
    scores = [-20.0, -21, -22, -23, -24, -25, -26, -3, -2, -1, -4]
    tokens = [*specials, *BYTES, *user, *normal]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] * 4 + [6] * 256 + [4] * 5 + [1] * len(normal)),
        "tokenizer.ggml.scores": np.array([-1000.0] * 265 + scores),
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        **changes,
    }
    return GgufFile(Path("m.gguf"), metadata, {}, 0)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("the", ["the"]),
        ("the the", ["the", "▁the"]),
        ("  the", ["▁▁", "the"]),
        ("     the", ["▁▁▁", "▁▁", "the"]),
        ("\n\n\nthe", ["\n\n", "\n", "the"]),
        ("<b>e", ["<b>", "e"]),
        ("< b>", ["<", "▁", "b", ">"]),
        ("é", ["<0xC3>", "<0xA9>"]),
        ("<eos>", ["<eos>"]),
        ("tthe", ["t", "the"]),
    ],
)
def test_sentencepiece(text, tokens):
    tokenizer = make_tokenizer(sentencepiece())
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["<bos>", *tokens]
    assert tokenizer.decode(encoded.ids[1:], skip_special_tokens=False) == text


def test_space_prefix_and_no_bos():
    changes = {"tokenizer.ggml.add_space_prefix": True, "tokenizer.ggml.add_bos_token": False}
    tokenizer = make_tokenizer(sentencepiece(**changes))
    encoded = tokenizer.encode("the the")
    assert encoded.tokens == ["▁the", "▁the"]
    assert tokenizer.decode(encoded.ids) == "the the"


def test_merges_by_score():
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "ab": -2.0, "bc": -1.0, "abc": -3.0, "xy": 0.0}
    assert merges_by_score(scores) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


def byte_level(pre, tokens, merges):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3] + [1] * (len(tokens) - 1)),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": 0,
    }
    return GgufFile(Path("m.gguf"), metadata, {}, 0)


@pytest.mark.parametrize(
    ("pre", "numbers"),
    [("smollm", ["1", "2", "3", "4"]), ("gpt-2", ["123", "4"]), ("llama-bpe", ["123", "4"])],
)
def test_byte_level(pre, numbers):
    """How digits are split before BPE is known by name only: SmolLM2 takes them one by one."""
    tokens = ["<end>", "Ġ", "a", *"1234", "12", "123", "Ġa"]
    tokenizer = make_tokenizer(byte_level(pre, tokens, ["1 2", "12 3", "Ġ a"]))
    encoded = tokenizer.encode("a a1234<end>")
    assert encoded.tokens == ["a", "Ġa", *numbers, "<end>"]
    assert tokenizer.decode(encoded.ids) == "a a1234"


def test_tokenizer_config():
    config = make_tokenizer_config(sentencepiece(), 512)
    assert config == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
