"""Chat templates as transformers renders them: the same sandbox, functions and filters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MARK = "<<the last message ends here>> "


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads this class attribute)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str] | None = None,
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja2 source; it comes with the model and is not trusted, hence the sandbox.
        messages: `{"role": ..., "content": ...}` each.
        add_generation_prompt: end with the start of the assistant's answer.
        special_tokens: such as `bos_token`, by the name templates use.

    Raises:
        ValueError: the template is malformed or refuses these messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template).render(
            messages=list(messages),
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **(special_tokens or {}),
        )
    except (jinja2.TemplateError, TypeError, OverflowError) as error:
        raise ValueError(f"the chat template refuses this conversation: {error}") from None


def render_unfinished_chat(
    template: str, messages: Sequence[Mapping[str, Any]], special_tokens: Mapping[str, str] | None = None
) -> str:
    """The text of a conversation up to the end of its last message, as transformers' `continue_final_message`.

    Raises:
        ValueError: no messages, or the template is malformed, refuses them or leaves the last one out.
    """
    if not messages:
        raise ValueError("the conversation has no messages, expected one to continue")
    last = messages[-1]
    marked = {**last, "content": f"{last['content']}{_MARK}"}
    text = render_chat(template, [*messages[:-1], marked], False, special_tokens)
    end = text.rfind(_MARK.strip())
    if end < 0:
        raise ValueError("the chat template leaves out the end of the last message, which is to be continued")
    # A template that trims messages has trimmed the mark, and would have trimmed what is before it.
    return text[:end] if text.startswith(_MARK, end) else text[:end].rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Unlike Jinja2's own filter, without escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
