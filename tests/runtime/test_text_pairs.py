"""How a context and its continuation become tokens: the rules of lm-evaluation-harness, one by one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bdq_runtime.text_pairs import encode_pair, encode_text
from bdq_runtime.tokenizer import TextTokenizer

END, BEGIN = 258, 259


@pytest.fixture(scope="module")
def tokenizer(tiny_decoder: Callable[..., Path]) -> TextTokenizer:
    return TextTokenizer(tiny_decoder())


@pytest.fixture(scope="module")
def begun(tiny_decoder: Callable[..., Path]) -> TextTokenizer:
    return TextTokenizer(tiny_decoder(begin=True))


def test_spaces_move_to_the_continuation(tokenizer: TextTokenizer, begun: TextTokenizer) -> None:
    before, after = encode_pair(tokenizer, "so ", "then")
    assert before == tokenizer.encode("so")
    assert after == tokenizer.encode(" then"), "the merge of space and t is found"
    assert encode_pair(tokenizer, "so \n ", "th") == (before, tokenizer.encode(" \n th")), "all white space moves"
    assert encode_pair(begun, "so", " then") == ([BEGIN, *before], after), "begins, and does not end with <end>"


def test_a_token_across_the_border_is_cut_at_the_length_of_the_context(tokenizer: TextTokenizer) -> None:
    # "t" + "hen": together "th", "e", "n". The context keeps its own token, the continuation is what is beyond it.
    before, after = encode_pair(tokenizer, "t", "hen")
    assert (before, after) == (tokenizer.encode("t"), tokenizer.encode("en"))


def test_a_text_is_not_begun_twice(begun: TextTokenizer) -> None:
    assert encode_text(begun, "so") == [BEGIN, *begun.encode("so")]
    assert encode_text(begun, "<begin>so") == [BEGIN, *begun.encode("so")]


def test_an_empty_context_is_the_token_that_begins_texts(
    tokenizer: TextTokenizer, begun: TextTokenizer, tmp_path: Path
) -> None:
    for found in (tokenizer, begun):
        assert encode_pair(found, "", "then") == ([BEGIN], found.encode("then"))
        assert encode_pair(found, "", "<begin>then") == ([BEGIN], found.encode("then"))
        assert encode_pair(found, " ", "then") == ([BEGIN], found.encode(" then"))
    shutil.copytree(tokenizer.directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "bos_token": None}))
    assert encode_pair(TextTokenizer(tmp_path), "", "a") == ([END], tokenizer.encode("a"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no bos_token or eos_token"):
        encode_pair(TextTokenizer(tmp_path), "", "a")


def test_a_continuation_without_tokens_is_refused(tokenizer: TextTokenizer) -> None:
    for context in ("so", ""):
        with pytest.raises(ValueError, match="adds no token"):
            encode_pair(tokenizer, context, "")
