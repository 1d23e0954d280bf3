"""Task scores, computed by hand from the logits of full runs, and errors of task files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bdq_runtime.model import LanguageModel
from bdq_runtime.tasks import (
    LastWord,
    MultipleChoice,
    PartialContext,
    encode_pair,
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


def by_hand(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One full run over everything, then log-softmax at the positions that predict the continuation."""
    model.reset()
    logits = model.append(context + continuation[:-1], all_logits=True)[len(context) - 1 :].astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    score = sum(log_probabilities[i, token] for i, token in enumerate(continuation))
    return float(score), logits.argmax(-1).tolist() == continuation


def test_log_likelihoods_equal_full_runs(model: LanguageModel, tokenizer: TextTokenizer) -> None:
    continuations = (" yes", " no way", "!", " the end")
    found = log_likelihoods(model, tokenizer, "Is it so?", continuations)
    context = tokenizer.encode("Is it so?")
    for (score, greedy), continuation in zip(found, continuations, strict=True):
        expected, expected_greedy = by_hand(model, context, tokenizer.encode(continuation))
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == expected_greedy


def test_long_contexts_lose_their_start(model: LanguageModel, tokenizer: TextTokenizer) -> None:
    ((score, _),) = log_likelihoods(model, tokenizer, "abcdef " * 50 + "x", ("yz",))
    # 256 positions are read: all of the text but its last token.
    context = tokenizer.encode("abcdef " * 50 + "x")[-(256 + 1 - 2) :]
    assert score == pytest.approx(by_hand(model, context, tokenizer.encode("yz"))[0], abs=1e-3)


def test_multiple_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {" aa": -2.0, " bbbbbb": -3.0, " c": -2.5}
    monkeypatch.setattr(
        "bdq_runtime.tasks.log_likelihoods", lambda m, t, context, choices: [(scores[c], False) for c in choices]
    )
    # By log-likelihood " aa" wins; by characters (-1, -0.5, -2.5) " bbbbbb" does.
    rows = [MultipleChoice("q", tuple(scores), gold) for gold in (0, 1, 1, 2)]
    found = evaluate_task(None, None, rows, "t")  # type: ignore[arg-type]
    assert (found.rows, found.accuracy, found.accuracy_norm) == (4, 0.25, 0.5)
    assert found.accuracy_stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert found.target_perplexity is None
    # Six characters without the space: -3/6 = -0.5 beats " dd" at -1.02/2 = -0.51, and -3/7 would too, -3/5 would not.
    scores.update({" dd": -1.02})
    found = evaluate_task(None, None, [MultipleChoice("q", (" dd", " bbbbbb"), 1)], "t")  # type: ignore[arg-type]
    assert (found.accuracy, found.accuracy_norm) == (0.0, 1.0)


def test_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {" one": (-1.0, True), " two": (-3.0, False)}
    monkeypatch.setattr("bdq_runtime.tasks.log_likelihoods", lambda m, t, context, targets: [answers[targets[0]]])
    found = evaluate_task(None, None, [LastWord("c", " one"), LastWord("c", " two")], "lambada")  # type: ignore[arg-type]
    assert (found.accuracy, found.accuracy_norm) == (0.5, None)
    assert found.target_perplexity == pytest.approx(math.exp(2.0))


def test_partial_context(model: LanguageModel, tokenizer: TextTokenizer) -> None:
    contexts, continuation = ("Ann so Ann", "Ann so Bob"), " left early."
    scores = [by_hand(model, tokenizer.encode(c), tokenizer.encode(continuation))[0] for c in contexts]
    best = int(np.argmax(scores))
    for gold in (0, 1):
        found = evaluate_task(model, tokenizer, [PartialContext(contexts, continuation, gold)], "w")
        assert found.accuracy == float(gold == best)


def test_spaces_move_to_the_continuation(tokenizer: TextTokenizer, tiny_decoder: Callable[..., Path]) -> None:
    before, after = encode_pair(tokenizer, "so ", "then")
    assert before == tokenizer.encode("so")
    assert after == tokenizer.encode(" then"), "the merge of space and t is found"
    begun = TextTokenizer(tiny_decoder(begin=True))
    assert encode_pair(begun, "so", " then") == ([259, *before], after)


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
    partial = '{"contexts": ["a", "b"], "continuation": " c", "gold": 0}'
    assert load_rows(write(tmp_path, partial)) == [PartialContext(("a", "b"), " c", 0)]


GOOD = '{"context": "a", "target": " b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"context": "a", ', "line 2 is not valid JSON"),
        ("[1]", "line 2 is a list"),
        ('{"context": "a"}', "line 2: 'target' is None"),
        ('{"context": "", "target": "b"}', "line 2: 'context' is ''"),
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
