"""Task scores, computed by hand from the logits of full runs, and errors of task files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bdq_runtime.likelihood import LogLikelihood
from bdq_runtime.model import LanguageModel
from bdq_runtime.tasks import (
    LastWord,
    MultipleChoice,
    PartialContext,
    evaluate_task,
    load_rows,
    log_likelihoods,
)
from bdq_runtime.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_decoder: Callable[..., Path]) -> TextTokenizer:
    return TextTokenizer(tiny_decoder())


@pytest.fixture(scope="module")
def model(tiny_decoder: Callable[..., Path]) -> LanguageModel:
    return LanguageModel(tiny_decoder(), threads=1)


def by_hand(model: LanguageModel, tokenizer: TextTokenizer, context: str, continuation: str) -> float:
    """One full run over everything, then log-softmax at the positions that predict the continuation."""
    before, after = tokenizer.encode(context), tokenizer.encode(continuation)
    model.reset()
    logits = model.append(before + after[:-1], all_logits=True)[len(before) - 1 :].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(sum(log_probabilities[i, token] for i, token in enumerate(after)))


def test_log_likelihoods_keep_the_order_of_their_pairs(model: LanguageModel, tokenizer: TextTokenizer) -> None:
    pairs = [("Is it so?", " yes"), ("zz", "!"), ("Is it so?", " no way"), ("Is it", " the end"), ("zz", "!")]
    seen: list[int] = []
    found = log_likelihoods(model, tokenizer, pairs, seen.append)
    assert [score.total for score in found] == pytest.approx(
        [by_hand(model, tokenizer, *pair) for pair in pairs], abs=1e-3
    )
    assert sorted(seen) == [0, 1, 2, 3, 4]


Scores = dict[tuple[str, str], tuple[float, bool]]


def give(monkeypatch: pytest.MonkeyPatch, scores: Scores) -> None:
    """Put given scores in the place of a model's."""

    def given(model: object, tokenizer: object, pairs: list[tuple[str, str]], on_pair: object) -> list[LogLikelihood]:
        return [LogLikelihood(*scores[pair]) for pair in pairs]

    monkeypatch.setattr("bdq_runtime.tasks.log_likelihoods", given)


def test_multiple_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = {" aa": -2.0, " bbbbbb": -3.0, " c": -2.5, " dd": -1.02, " ééé": -1.56}
    give(monkeypatch, {("q", choice): (total, False) for choice, total in totals.items()})
    # By log-likelihood " aa" wins; by characters (-1, -0.5, -2.5) " bbbbbb" does.
    rows = [MultipleChoice("q", (" aa", " bbbbbb", " c"), gold) for gold in (0, 1, 1, 2)]
    found = evaluate_task(None, None, rows, "t")  # type: ignore[arg-type]
    assert (found.rows, found.accuracy, found.accuracy_norm) == (4, 0.25, 0.5)
    assert found.accuracy_stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert found.target_perplexity is None
    # Six characters without the space: -3/6 = -0.5 beats " dd" at -1.02/2 = -0.51; -1.02/3 (with the space) would win.
    found = evaluate_task(None, None, [MultipleChoice("q", (" dd", " bbbbbb"), 1)], "t")  # type: ignore[arg-type]
    assert (found.accuracy, found.accuracy_norm) == (0.0, 1.0)
    # Characters, not bytes: -1.56/3 = -0.52 loses to -0.51, while -1.56/6 would win.
    found = evaluate_task(None, None, [MultipleChoice("q", (" dd", " ééé"), 0)], "t")  # type: ignore[arg-type]
    assert found.accuracy_norm == 1.0


def test_the_first_of_equals_is_picked(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {("q", " a"): (-1.0, False), ("q", " b"): (-1.0, False)})
    found = [evaluate_task(None, None, [MultipleChoice("q", (" a", " b"), g)], "t") for g in (0, 1)]  # type: ignore[arg-type]
    assert [f.accuracy for f in found] == [1.0, 0.0]


def test_choices_without_a_space_count_whole() -> None:
    assert MultipleChoice("q\n", ("abc", " abc"), 0).lengths() == [3, 3]


def test_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, {("c", " one"): (-1.0, True), ("c", " two"): (-3.0, False)})
    found = evaluate_task(None, None, [LastWord("c", " one"), LastWord("c", " two")], "lambada")  # type: ignore[arg-type]
    assert (found.accuracy, found.accuracy_norm) == (0.5, None)
    assert found.target_perplexity == pytest.approx(math.exp(2.0))


def test_partial_context(model: LanguageModel, tokenizer: TextTokenizer) -> None:
    contexts, continuation = ("Ann so Ann", "Ann so Bob"), " left early."
    best = int(np.argmax([by_hand(model, tokenizer, context, continuation) for context in contexts]))
    for gold in (0, 1):
        found = evaluate_task(model, tokenizer, [PartialContext(contexts, continuation, gold)], "w")
        assert found.accuracy == float(gold == best)


def test_progress_counts_finished_rows(model: LanguageModel, tokenizer: TextTokenizer) -> None:
    rows = [MultipleChoice("a" * n, (" x", " yy"), 0) for n in (3, 1, 2)]
    seen: list[int] = []
    evaluate_task(model, tokenizer, rows, "t", seen.append)
    assert seen == [1, 2, 3]


def write(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "task.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_loads_all_kinds(tmp_path: Path) -> None:
    choice = {"context": "a\u2028b", "choices": [" x", " y"], "gold": 1, "id": 7}
    assert load_rows(write(tmp_path, json.dumps(choice, ensure_ascii=False), "")) == [
        MultipleChoice("a\u2028b", (" x", " y"), 1)
    ]
    assert load_rows(write(tmp_path, '{"context": "a", "target": " b"}')) == [LastWord("a", " b")]
    assert load_rows(write(tmp_path, '{"context": "", "target": "b"}')) == [LastWord("", "b")]
    partial = '{"contexts": ["a", "b"], "continuation": " c", "gold": 0}'
    assert load_rows(write(tmp_path, partial)) == [PartialContext(("a", "b"), " c", 0)]


GOOD = '{"context": "a", "target": " b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a", ', "line 2 is not valid JSON"),
        ("[1]", "line 2 is a list"),
        ('{"context": "a"}', "line 2: 'target' is None"),
        ('{"context": 3, "target": "b"}', "line 2: 'context' is 3"),
        ('{"context": "a", "target": " "}', "line 2: 'target' is ' '"),
        ('{"context": "a", "choices": [" x"], "gold": 0}', "line 2: 'choices'"),
        ('{"context": "a", "choices": [" x", " y"], "gold": 2}', "line 2: 'gold' is 2, expected an index below 2"),
        ('{"context": "a", "choices": [" x", " y"], "gold": true}', "line 2: 'gold' is True"),
        (
            '{"context": "a", "choices": [" x", " y"], "gold": 1}',
            "row 2 is a multiple-choice row, the first a last-word",
        ),
    ],
)
def test_malformed_rows_name_their_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path, GOOD, line))


def test_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no rows"):
        load_rows(write(tmp_path, ""))
    (tmp_path / "task.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        load_rows(tmp_path / "task.jsonl")
