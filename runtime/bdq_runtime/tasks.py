"""Zero-shot tasks, scored as lm-evaluation-harness scores them.

A file holds one task, a JSON object a line:

    multiple choice   {"context": str, "choices": [str, ...], "gold": int}     choices start with their space
    last word         {"context": str, "target": str}                          LAMBADA
    partial context   {"contexts": [str, ...], "continuation": str, "gold": int}     WinoGrande
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdq_runtime.likelihood import LogLikelihood, score_pairs
from bdq_runtime.model import LanguageModel
from bdq_runtime.text_pairs import encode_pair
from bdq_runtime.tokenizer import TextTokenizer


@dataclass(frozen=True)
class MultipleChoice:
    """One context, several continuations, one of them right."""

    context: str
    choices: tuple[str, ...]
    gold: int

    def pairs(self) -> list[tuple[str, str]]:
        """What is scored: context and continuation."""
        return [(self.context, choice) for choice in self.choices]

    def lengths(self) -> list[int]:
        """Characters (not bytes) of each choice, without the space that delimits it from the context."""
        return [len(choice) - choice.startswith(" ") for choice in self.choices]


@dataclass(frozen=True)
class LastWord:
    """A text whose last word is to be predicted exactly."""

    context: str
    target: str

    def pairs(self) -> list[tuple[str, str]]:
        """What is scored: context and continuation."""
        return [(self.context, self.target)]


@dataclass(frozen=True)
class PartialContext:
    """Several contexts, one continuation, which is likeliest after the right one."""

    contexts: tuple[str, ...]
    continuation: str
    gold: int

    def pairs(self) -> list[tuple[str, str]]:
        """What is scored: context and continuation."""
        return [(context, self.continuation) for context in self.contexts]


Row = MultipleChoice | LastWord | PartialContext


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task.

    Attributes:
        name: of the file, without its ending.
        rows: rows scored.
        accuracy: share of rows that are right.
        accuracy_stderr: its standard error.
        accuracy_norm: with log-likelihoods divided by `MultipleChoice.lengths`; multiple choice only.
        target_perplexity: exp of the mean negative log-likelihood of a target; last word only.
    """

    name: str
    rows: int
    accuracy: float
    accuracy_stderr: float
    accuracy_norm: float | None = None
    target_perplexity: float | None = None


def load_rows(path: str | Path) -> list[Row]:
    """The rows of a task file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text, empty, or a line that is no row (the message has its number).
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"task file {file} does not exist; give a .jsonl file")
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"task file {file} is not UTF-8 text; give a .jsonl file") from None
    rows = [_row(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise ValueError(f"task file {file} has no rows; give one JSON object a line")
    for number, row in enumerate(rows, 1):
        if type(row) is not type(rows[0]):
            raise ValueError(f"{file}, row {number} is a {_name(row)} row, the first a {_name(rows[0])}")
    return rows


def _name(row: Row) -> str:
    return {MultipleChoice: "multiple-choice", LastWord: "last-word", PartialContext: "partial-context"}[type(row)]


def _row(file: Path, number: int, line: str) -> Row:
    where = f"{file}, line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a {type(value).__name__}, expected an object")
    if "choices" in value:
        choices = _texts(value, "choices", where)
        return MultipleChoice(_context(value, where), choices, _gold(value, len(choices), where))
    if "contexts" in value:
        contexts = _texts(value, "contexts", where)
        return PartialContext(contexts, _text(value, "continuation", where), _gold(value, len(contexts), where))
    return LastWord(_context(value, where), _text(value, "target", where))


def _context(value: dict[str, Any], where: str) -> str:
    found = value.get("context")
    if not isinstance(found, str):
        raise ValueError(f"{where}: 'context' is {found!r}, expected a text (it may be empty)")
    return found


def _text(value: dict[str, Any], key: str, where: str) -> str:
    found = value.get(key)
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{where}: {key!r} is {found!r}, expected a text that is not empty")
    return found


def _texts(value: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    found = value[key]
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(v, str) and v.strip() for v in found):
        raise ValueError(f"{where}: {key!r} is {str(found)[:60]!r}, expected a list of at least two texts")
    return tuple(found)


def _gold(value: dict[str, Any], count: int, where: str) -> int:
    found = value.get("gold")
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < count:
        raise ValueError(f"{where}: 'gold' is {found!r}, expected an index below {count}")
    return found


def evaluate_task(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    rows: Sequence[Row],
    name: str,
    on_row: Callable[[int], None] | None = None,
) -> TaskResult:
    """Score `rows`, all of one kind; `on_row` is called with the number done.

    Raises:
        ValueError: a continuation that adds no token, or that is longer than the model's context.
    """
    pairs = [row.pairs() for row in rows]
    owners = [owner for owner, of_row in enumerate(pairs) for _ in of_row]
    left, done = [len(of_row) for of_row in pairs], 0

    def on_pair(index: int) -> None:
        nonlocal done
        left[owners[index]] -= 1
        if not left[owners[index]]:
            done += 1
            if on_row is not None:
                on_row(done)

    found = iter(log_likelihoods(model, tokenizer, [pair for of_row in pairs for pair in of_row], on_pair))
    return _summary(name, rows, [[next(found) for _ in of_row] for of_row in pairs])


def log_likelihoods(
    model: LanguageModel,
    tokenizer: TextTokenizer,
    pairs: Sequence[tuple[str, str]],
    on_pair: Callable[[int], None] | None = None,
) -> list[LogLikelihood]:
    """Log-likelihood of each continuation after its context; `on_pair` is called with the index of a scored pair.

    Raises:
        ValueError: a continuation that adds no token, or that is longer than the model's context.
    """
    encoded = [encode_pair(tokenizer, context, continuation) for context, continuation in pairs]
    found: dict[int, LogLikelihood] = {}
    for index, result in score_pairs(model, encoded):
        found[index] = result
        if on_pair is not None:
            on_pair(index)
    return [found[index] for index in range(len(pairs))]


def _summary(name: str, rows: Sequence[Row], scores: Sequence[Sequence[LogLikelihood]]) -> TaskResult:
    right = right_norm = 0
    log_likelihood = 0.0
    for row, found in zip(rows, scores, strict=True):
        totals = [score.total for score in found]
        if isinstance(row, LastWord):
            right += found[0].greedy
            log_likelihood += totals[0]
        else:
            right += int(np.argmax(totals)) == row.gold
        if isinstance(row, MultipleChoice):
            right_norm += int(np.argmax(np.divide(totals, row.lengths()))) == row.gold
    count = len(rows)
    accuracy = right / count
    return TaskResult(
        name,
        count,
        accuracy,
        accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1)),
        accuracy_norm=right_norm / count if isinstance(rows[0], MultipleChoice) else None,
        target_perplexity=math.exp(-log_likelihood / count) if isinstance(rows[0], LastWord) else None,
    )
