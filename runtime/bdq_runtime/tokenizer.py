"""Text to tokens and back: tokenizer.json, streaming without broken characters, the chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdq_runtime.folder import ModelFolder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_FILE = "tokenizer.json"
_PREFIXES = ("bos_token", "eos_token")
_REPLACEMENT = "\ufffd"


class TextTokenizer:
    """The tokenizer of a model folder.

    Attributes:
        directory: the folder.
        backend: the `tokenizers.Tokenizer` of tokenizer.json.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read `tokenizer.json` of `directory` (or of the folder of an `.onnx` file).

        Raises:
            FileNotFoundError: there is none.
            ValueError: it cannot be read, or tokenizer_config.json is not JSON.
        """
        found = Path(directory)
        self.directory = found.parent if found.is_file() else found
        path = self.directory / TOKENIZER_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{self.directory} has no {TOKENIZER_FILE}; copy the model's own beside the graph")
        from tokenizers import Tokenizer

        try:
            self.backend: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"{path} is not a tokenizer: {error}; copy the model's own") from None
        self._config = ModelFolder(self.directory / "model.onnx").read_json("tokenizer_config.json")

    def encode(self, text: str, begin: bool = False) -> list[int]:
        """Token ids of `text`, after those of `beginning()` with `begin`; never followed by an end-of-text token."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return self.beginning() + ids if begin else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def beginning(self) -> list[int]:
        """Token ids that the model expects before every text; none for many models."""
        plain = self.encode("a")
        whole: list[int] = self.backend.encode("a", add_special_tokens=True).ids
        return whole[: whole.index(plain[0])] if plain and plain[0] in whole else []

    def prefix_token(self) -> str | None:
        """The token that stands for an empty context: that which begins texts, else that which ends them."""
        return next((_content(self._config[name]) for name in _PREFIXES if self.token_id(name) is not None), None)

    def prefix_id(self) -> int | None:
        """Id of `prefix_token()`."""
        return next((found for name in _PREFIXES if (found := self.token_id(name)) is not None), None)

    def token_id(self, name: str) -> int | None:
        """Id of a special token by its name in tokenizer_config.json, such as `eos_token`; None where it has none."""
        value = self._config.get(name)
        found: int | None = self.backend.token_to_id(_content(value)) if value else None
        return found

    def stream(self) -> TextStream:
        """A decoder that takes one token at a time."""
        return TextStream(self)

    def has_chat_template(self) -> bool:
        """Whether the folder says how a conversation is written."""
        return self.template() is not None

    def template(self, name: str = "default") -> str | None:
        """The Jinja2 source of a chat template; None where there is none.

        Raises:
            ValueError: there is a template, but none of this name.
        """
        file = self.directory / "chat_template.jinja"
        value = file.read_text(encoding="utf-8") if file.is_file() else self._config.get("chat_template")
        entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
        named = {str(entry.get("name")): entry.get("template") for entry in entries if isinstance(entry, dict)}
        if name != "default" and name not in named:
            raise ValueError(f"{self.directory} has no chat template {name!r}, expected one of {', '.join(named)}")
        found = named.get(name)
        return found if isinstance(found, str) else None

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `chat_text`."""
        # the template has written the special tokens already
        return self.encode(self.chat_text(messages, add_generation_prompt))

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
    ) -> str:
        """A conversation, written by the model's own template.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            add_generation_prompt: end with the start of the assistant's answer.
            continue_final: end where the last message does, so that it can be continued.

        Raises:
            ValueError: there is no template, or it refuses these messages.
        """
        template = self.template()
        if template is None:
            raise ValueError(f"{self.directory} has no chat template (chat_template.jinja); run without --chat")
        from bdq_runtime.chat import render_chat, render_unfinished_chat

        special = {name: _content(value) for name, value in self._config.items() if name.endswith("_token") and value}
        if continue_final:
            return render_unfinished_chat(template, messages, special)
        return render_chat(template, messages, add_generation_prompt, special)


class TextStream:
    """Turns tokens into text as they come; a character whose bytes are not complete is held back.

    The concatenated pieces equal the text of all tokens: a token is decoded after the ones before it, because some
    tokenizers drop a leading space or join bytes across tokens.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._context: list[int] = []
        self._pending: list[int] = []
        self._printed = 0

    def push(self, token: int) -> str:
        """The text that `token` completes; often empty in the middle of a character."""
        self._pending.append(token)
        text = self._tokenizer.decode(self._context + self._pending)
        # Only trailing replacement characters can still become a real one.
        stable = text.rstrip(_REPLACEMENT)
        piece = stable[self._printed :]
        self._printed = max(self._printed, len(stable))
        if piece and len(stable) == len(text):
            self._context, self._pending = self._pending, []
            self._printed = len(self._tokenizer.decode(self._context))
        return piece

    def flush(self) -> str:
        """What is held back at the end; bytes that never became a character read as U+FFFD."""
        text = self._tokenizer.decode(self._context + self._pending)
        piece = text[self._printed :]
        self._context, self._pending, self._printed = [], [], 0
        return piece


def _content(value: Any) -> str:
    """A special token as text: tokenizer_config.json writes a string or `{"content": ...}`."""
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)
