"""Mean, spread and table of made-up figures, with results worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from bdq_export.comparison.rows import Row, summarize
from bdq_export.comparison.store import Comparison, open_comparison, save
from bdq_export.errors import InvalidInputError, UsageError

EVALUATION = {
    "text": {"name": "text.txt", "sha256": "ab"},
    "seq_len": 64,
    "max_windows": 2,
    "tasks": {"arc": "cd"},
}


def row(method: str, seed: int, scheme: str = "w4a4kv4", **figures: float | None) -> Row:
    return Row(scheme, method, seed, f"key of {method} {seed}", figures=figures)


ROWS = (
    row("bdq", 0, perplexity=30.0, float_perplexity=20.0, **{"arc.accuracy": 0.5, "arc.accuracy_norm": 0.25}),
    row("bdq", 1, perplexity=31.0, float_perplexity=20.0, **{"arc.accuracy": 0.5, "arc.accuracy_norm": 0.25}),
    row("rtn", 0, perplexity=123456.0, float_perplexity=20.0, **{"arc.accuracy": None}),
    row("bdq", 2, perplexity=33.0, float_perplexity=20.0, **{"arc.accuracy": 0.8, "arc.accuracy_norm": 0.25}),
    row("bdq", 0, "w4a16", perplexity=21.0, float_perplexity=20.0, **{"arc.accuracy": 0.5}),
    replace(row("rtn", 1), error="the output is full of | NaN"),
    replace(row("gptq", 0), error="refused"),
)


def test_mean_and_spread_by_hand() -> None:
    first, second, third = summarize(ROWS)
    assert [(each.scheme, each.method, each.seeds) for each in (first, second, third)] == [
        ("w4a4kv4", "bdq", (0, 1, 2)),
        ("w4a4kv4", "rtn", (0,)),
        ("w4a16", "bdq", (0,)),
    ]
    # 30, 31, 33: mean 94 / 3; deviations -4/3, -1/3, 5/3, so their squares sum to 42 / 9, over n - 1 = 2.
    assert first.mean["perplexity"] == pytest.approx(94 / 3)
    assert first.spread["perplexity"] == pytest.approx(math.sqrt(42 / 9 / 2))
    # 0.5, 0.5, 0.8: deviations -0.1, -0.1, 0.2.
    assert first.mean["arc.accuracy"] == pytest.approx(0.6)
    assert first.spread["arc.accuracy"] == pytest.approx(math.sqrt(0.06 / 2))
    assert first.spread["arc.accuracy_norm"] == 0.0
    assert second.mean == {"perplexity": 123456.0, "float_perplexity": 20.0, "arc.accuracy": None}
    assert set(second.spread.values()) == {None}


def test_a_seed_without_a_figure_is_not_hidden_by_the_others() -> None:
    (found,) = summarize([row("bdq", 0, perplexity=30.0), row("bdq", 1, perplexity=None)])
    assert (found.mean, found.spread, found.seeds) == ({"perplexity": None}, {"perplexity": None}, (0, 1))


def test_markdown() -> None:
    lines = Comparison("tiny", "12", EVALUATION, ROWS).markdown().splitlines()
    assert lines[0] == "# tiny, 2 windows of 64 tokens of text.txt"
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| scheme | method | seeds | perplexity | arc % | arc norm % |",
        "|---|---|---|---|---|---|",
        "| w4a4kv4 | bdq | 3 | 31.333 ± 1.528 | 60.0 ± 17.3 | 25.0 ± 0.0 |",
        "| w4a4kv4 | rtn | 1 of 2 | 1.23e+05 | - | - |",
        "| w4a16 | bdq | 1 | 21.000 | 50.0 | - |",
    ]
    assert "Perplexity of the float model: 20.000." in lines
    assert lines[-2:] == [
        "- w4a4kv4, rtn, seed 1: the output is full of | NaN",
        "- w4a4kv4, gptq, seed 0: refused",
    ]


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    empty = Comparison("tiny", "12", EVALUATION)
    assert open_comparison(tmp_path, empty) == empty
    whole = replace(empty, rows=ROWS)
    save(tmp_path, whole)
    assert open_comparison(tmp_path, empty) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md"]
    assert json.loads((tmp_path / "compare.json").read_text())["summary"][0]["seeds"] == [0, 1, 2]
    changed = whole.with_row(row("bdq", 1, perplexity=1.0)).with_row(row("smooth", 0))
    assert [each.place for each in changed.rows] == [*(each.place for each in ROWS), ("w4a4kv4", "smooth", 0)]
    assert changed.rows[1].figures == {"perplexity": 1.0}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source_hash": "13"}, "another model (tiny); choose another --out"),
        ({"evaluation": {**EVALUATION, "seq_len": 32, "tasks": {}}}, "another evaluation (seq_len, tasks)"),
    ],
)
def test_rows_that_are_not_comparable_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    now = Comparison("tiny", "12", EVALUATION)
    save(tmp_path, replace(now, rows=ROWS))
    with pytest.raises(UsageError) as refusal:
        open_comparison(tmp_path, replace(now, **change))  # type: ignore[arg-type]
    assert words in str(refusal.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 9}', '{"format": 1, "rows": [{"a": 1}]}'])
def test_a_file_of_someone_else_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(InvalidInputError, match="was not written by bdq compare"):
        open_comparison(tmp_path, Comparison("tiny", "12", EVALUATION))
