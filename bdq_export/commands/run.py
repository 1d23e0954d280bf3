"""`bdq run`: generate text with an exported model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from bdq_export.commands.runtime_errors import invalid_input, require_at_least
from bdq_export.errors import UsageError

if TYPE_CHECKING:
    from bdq_runtime.model import LanguageModel
    from bdq_runtime.tokenizer import TextTokenizer


@dataclass(frozen=True)
class RunResult:
    """A generated text.

    Attributes:
        text: what the model wrote, without the prompt.
        prompt_tokens: tokens of the prompt as the model reads it.
        new_tokens: tokens generated.
        finish_reason: "stop" when the model ended the text, "length" when the limit did.
        seconds: of generation, without loading.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    finish_reason: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def run(
    model: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    threads: int | None = None,
) -> RunResult:
    """Generate a text; see `stream` for the arguments and errors."""
    job = _Job(model, prompt, max_new_tokens, temperature, seed, chat, threads)
    start = time.perf_counter()
    text = "".join(job.pieces())
    seconds = time.perf_counter() - start
    reason = "length" if job.generated >= job.limit else "stop"
    return RunResult(text, len(job.ids), job.generated, reason, seconds)


def stream(
    model: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    threads: int | None = None,
) -> Iterator[str]:
    """Generate a text piece by piece; a piece is never half a character.

    Args:
        model: `OUT.onnx`, or a folder that holds `model.onnx`, with its tokenizer beside it.
        prompt: what the model continues or, with `chat`, answers.
        max_new_tokens: stop after so many tokens.
        temperature: 0 is greedy.
        seed: of the sampling.
        chat: wrap the prompt in the model's chat template.
        threads: CPU threads; None for all cores.

    Raises:
        UsageError: an option out of range, or an empty prompt.
        InvalidInputError: no model, no tokenizer, no chat template where one is asked for, or a malformed file.
    """
    return _Job(model, prompt, max_new_tokens, temperature, seed, chat, threads).pieces()


def render(result: RunResult) -> RenderableType:
    """The text and its cost, for a terminal."""
    speed = result.new_tokens / result.seconds if result.seconds else math.nan
    cost = f"{result.prompt_tokens} + {result.new_tokens} tokens, {result.seconds:.1f} s, {speed:.1f} tokens/s"
    return Group(Text(result.text), Text(cost, style="dim"))


class _Job:
    """One generation: everything is opened and checked before the first token."""

    def __init__(
        self,
        model: str | Path,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        chat: bool,
        threads: int | None,
    ) -> None:
        require_at_least("--max-new-tokens", max_new_tokens, 1)
        require_at_least("--threads", threads, 1)
        require_at_least("--seed", seed, 0)
        if not 0 <= temperature < math.inf:
            raise UsageError(f"--temperature is {temperature}, expected 0 (greedy) or more")
        if not prompt:
            raise UsageError("--prompt is empty; give a text")
        from bdq_runtime.folder import ModelFolder
        from bdq_runtime.generate import generate_tokens
        from bdq_runtime.model import LanguageModel
        from bdq_runtime.tokenizer import TextTokenizer

        with invalid_input():
            # The cheap checks come first: no model is loaded for want of a tokenizer.
            self._tokenizer: TextTokenizer = TextTokenizer(ModelFolder.of(model).directory)
            if chat:
                self.ids = self._tokenizer.chat([{"role": "user", "content": prompt}])
            else:
                self.ids = self._tokenizer.encode(prompt, begin=True)
            loaded: LanguageModel = LanguageModel(model, threads=threads)
            room = (loaded.context_length or max_new_tokens + len(self.ids)) - len(self.ids)
            self.limit = min(max_new_tokens, room)
            self._tokens = generate_tokens(loaded, self.ids, max_new_tokens, temperature, seed)
        self.generated = 0

    def pieces(self) -> Iterator[str]:
        """The text as it comes."""
        decoder = self._tokenizer.stream()
        with invalid_input():
            for token in self._tokens:
                self.generated += 1
                if piece := decoder.push(token):
                    yield piece
        if rest := decoder.flush():
            yield rest
