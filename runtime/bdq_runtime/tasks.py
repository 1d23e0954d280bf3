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

from bdq_runtime.model import LanguageModel
from bdq_runtime.scoring import log_softmax, token_log_probabilities
from bdq_runtime.tokenizer import TextTokenizer


@dataclass(frozen=True)
class MultipleChoice:
    """One context, several continuations, one of them right."""

    context: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class LastWord:
    """A text whose last word is to be predicted exactly."""

    context: str
    target: str


@dataclass(frozen=True)
class PartialContext:
    """Several contexts, one continuation, which is likeliest after the right one."""

    contexts: tuple[str, ...]
    continuation: str
    gold: int


Row = MultipleChoice | LastWord | PartialContext


@dataclass(frozen=True)
class TaskResult:
    """Scores of one task.

    Attributes:
        name: of the file, without its ending.
        rows: rows scored.
        accuracy: share of rows that are right.
        accuracy_stderr: its standard error.
        accuracy_norm: with log-likelihoods divided by characters; multiple choice only.
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
        return MultipleChoice(_text(value, "context", where), choices, _gold(value, len(choices), where))
    if "contexts" in value:
        contexts = _texts(value, "contexts", where)
        return PartialContext(contexts, _text(value, "continuation", where), _gold(value, len(contexts), where))
    return LastWord(_text(value, "context", where), _text(value, "target", where))


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
    """Score `rows`, all of one kind; `on_row` is called with the number done."""
    right = right_norm = 0
    target_log_likelihood = 0.0
    for done, row in enumerate(rows, 1):
        if isinstance(row, MultipleChoice):
            scores = [score for score, _ in log_likelihoods(model, tokenizer, row.context, row.choices)]
            lengths = [max(1, len(choice) - choice.startswith(" ")) for choice in row.choices]
            right += int(np.argmax(scores)) == row.gold
            right_norm += int(np.argmax(np.divide(scores, lengths))) == row.gold
        elif isinstance(row, LastWord):
            ((score, greedy),) = log_likelihoods(model, tokenizer, row.context, (row.target,))
            right += greedy
            target_log_likelihood += score
        else:
            after = [log_likelihoods(model, tokenizer, c, (row.continuation,))[0][0] for c in row.contexts]
            right += int(np.argmax(after)) == row.gold
        if on_row is not None:
            on_row(done)
    count = len(rows)
    accuracy = right / count
    return TaskResult(
        name,
        count,
        accuracy,
        accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / max(1, count - 1)),
        accuracy_norm=right_norm / count if isinstance(rows[0], MultipleChoice) else None,
        target_perplexity=math.exp(-target_log_likelihood / count) if isinstance(rows[0], LastWord) else None,
    )


def log_likelihoods(
    model: LanguageModel, tokenizer: TextTokenizer, context: str, continuations: Sequence[str]
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation after `context`, and whether greedy decoding would have written it.

    The context is read once. Where the two together are longer than the model's context, the start is cut off.

    Raises:
        ValueError: a continuation that adds no token.
    """
    pairs = [encode_pair(tokenizer, context, continuation) for continuation in continuations]
    results, read = [], None
    for before, after in pairs:
        if model.context_length is not None:
            before = before[-max(1, model.context_length + 1 - len(after)) :]
        if before != read:
            model.reset(len(before) + len(after))
            first, read = log_softmax(model.append(before)[-1:]), before
        rows = [first]
        if len(after) > 1:
            rows.append(log_softmax(model.append(after[:-1], all_logits=True)))
            model.truncate(len(before))
        scores = np.concatenate(rows)
        targets = np.asarray(after)
        total = float(token_log_probabilities(scores, targets).sum())
        results.append((total, bool((scores.argmax(-1) == targets).all())))
    return results


def encode_pair(tokenizer: TextTokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what follows it.

    Spaces at the end of the context belong to the continuation, and the two are tokenized together: what is beyond the
    context's own tokens is the continuation.
    """
    stripped = context.rstrip()
    before = tokenizer.encode(stripped, begin=True)
    whole = tokenizer.encode(stripped + context[len(stripped) :] + continuation, begin=True)
    after = whole[len(before) :]
    if not after:
        raise ValueError(f"the continuation {continuation!r} adds no token to its context; leave that row out")
    return before, after
