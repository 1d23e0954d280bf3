"""Streaming never breaks a character; chat templates render as transformers renders them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bdq_runtime.chat import render_chat
from bdq_runtime.tokenizer import TextTokenizer

MESSAGES = [{"role": "user", "content": "a < b & 'é'"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_decoder: Callable[..., Path]) -> TextTokenizer:
    return TextTokenizer(tiny_decoder())


def pieces_of(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*(stream.push(token) for token in ids), stream.flush()]


def test_a_character_comes_when_its_last_byte_does(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("a😀b")
    assert len(ids) == 6, "the emoji is four tokens"
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "😀", "b", ""]
    # Control: decoding each token by itself breaks the character.
    assert "\ufffd" in "".join(tokenizer.decode([token]) for token in ids)


def test_half_a_character_at_the_end_is_flushed(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("ab😀")[:-1]
    pieces = pieces_of(tokenizer, ids)
    assert pieces[:2] == ["a", "b"]
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40))
def test_pieces_add_up_to_the_text(tokenizer: TextTokenizer, text: str) -> None:
    pieces = pieces_of(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(deadline=None, max_examples=150)
@given(ids=st.lists(st.integers(0, 259), max_size=30))
def test_any_tokens_add_up_to_their_decoding(tokenizer: TextTokenizer, ids: list[int]) -> None:
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_beginning_is_what_the_tokenizer_puts_first(tiny_decoder: Callable[..., Path]) -> None:
    plain, beginning = TextTokenizer(tiny_decoder()), TextTokenizer(tiny_decoder(begin=True))
    assert plain.beginning() == []
    assert beginning.beginning() == [259]
    assert beginning.encode("th", begin=True) == [259, 256], "no end token after a prompt"
    assert beginning.encode("th") == plain.encode("th", begin=True) == [256]


def test_chat_template_of_the_folder(tokenizer: TextTokenizer) -> None:
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}])) == "<user>hi>"
    assert (
        tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}], add_generation_prompt=False)) == "<user>hi"
    )


def test_chat_template_of_tokenizer_config(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_decoder(), tmp_path / "copy"))
    (folder / "chat_template.jinja").unlink()
    config = folder / "tokenizer_config.json"
    assert not TextTokenizer(folder).has_chat_template()
    with pytest.raises(ValueError, match="no chat template"):
        TextTokenizer(folder).chat(MESSAGES)
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{{ bos_token }}!{{ eos_token }}"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<begin>"}, "eos_token": "<end>"}))
    tokenizer = TextTokenizer(folder)
    assert tokenizer.chat(MESSAGES) == [259, *tokenizer.encode("!"), 258]


def test_templates_render_as_in_transformers() -> None:
    transformers = pytest.importorskip("transformers.utils.chat_template_utils")
    template = """
    {%- set ns = namespace(first=true) %}
    {%- for message in messages %}
        {%- if message.role == 'skip' %}{% continue %}{% endif %}
        {{- '[' + message['role'] + '] ' + (message.content | tojson) + '\n' }}
        {%- if message.role == 'assistant' %}{% generation %}{{ message.content | trim }}{% endgeneration %}{% endif %}
    {%- endfor %}
    {%- if add_generation_prompt %}
        {{- bos_token + strftime_now('%Y')[:2] }}
    {%- endif %}
    """
    messages = [*MESSAGES, {"role": "assistant", "content": " ok "}, {"role": "skip", "content": "x"}]
    found = render_chat(template, messages, True, {"bos_token": "<s>"})
    expected, _ = transformers.render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>"
    )
    assert found == expected[0]
    assert "a < b & 'é'" in found, "tojson escapes nothing for HTML"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses this conversation"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
    ],
)
def test_templates_are_not_trusted(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_chat(template, MESSAGES)


def test_missing_and_malformed_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        TextTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        TextTokenizer(tmp_path)
