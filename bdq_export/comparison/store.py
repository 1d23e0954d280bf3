"""`compare.json` and `compare.md`: rewritten after every row, so that a stopped comparison goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bdq_export.comparison.rows import Row, summarize
from bdq_export.comparison.table import markdown
from bdq_export.errors import InvalidInputError, UsageError

JSON_NAME = "compare.json"
MARKDOWN_NAME = "compare.md"
FORMAT = 1
"""Version of the layout of `compare.json`."""


@dataclass(frozen=True)
class Comparison:
    """All rows of one folder.

    Attributes:
        model: name of the source model, never its path.
        source_hash: `Checkpoint.content_hash` of it.
        evaluation: `Evaluation.describe`, and the hash of the model's tokenizer.
        rows: one for each scheme, method and seed, in the order in which they were first measured.
    """

    model: str
    source_hash: str
    evaluation: Mapping[str, Any]
    rows: tuple[Row, ...] = ()

    def row_at(self, place: tuple[str, str, int]) -> Row | None:
        """The row of a scheme, method and seed."""
        return next((row for row in self.rows if row.place == place), None)

    def with_row(self, row: Row) -> Comparison:
        """With `row` instead of the one at its place, or behind all others."""
        if self.row_at(row.place) is None:
            return replace(self, rows=(*self.rows, row))
        return replace(self, rows=tuple(row if each.place == row.place else each for each in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """As `compare.json` has it."""
        summary = [asdict(each) for each in summarize(self.rows)]
        return {"format": FORMAT, **asdict(self), "summary": summary}

    def markdown(self) -> str:
        """As `compare.md` has it."""
        evaluation = self.evaluation
        text = "" if evaluation["text"] is None else f", {_windows(evaluation)} of {evaluation['text']['name']}"
        title = f"{self.model}{text}"
        return markdown(title, self.rows)


def open_comparison(folder: Path, now: Comparison) -> Comparison:
    """`now` with the rows that `folder` has.

    Raises:
        UsageError: they are of another model, tokenizer, text or tasks, and so not comparable.
        InvalidInputError: `compare.json` is not what `save` writes.
    """
    path = folder / JSON_NAME
    if not path.exists():
        return now
    found = _load(path)
    for name in ("source_hash", "evaluation"):
        if getattr(found, name) != getattr(now, name):
            what = f"model ({found.model})" if name == "source_hash" else f"evaluation ({_difference(found, now)})"
            raise UsageError(f"{folder} holds a comparison with another {what}; choose another --out")
    return replace(now, rows=found.rows)


def save(folder: Path, comparison: Comparison) -> None:
    """Write both files, whole or not at all."""
    content = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    for name, text in ((JSON_NAME, content), (MARKDOWN_NAME, comparison.markdown())):
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


def _load(path: Path) -> Comparison:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, expected {FORMAT}")
        rows = tuple(Row(**row) for row in content["rows"])
        return Comparison(content["model"], content["source_hash"], content["evaluation"], rows)
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{path} was not written by bdq compare ({error}); choose another --out") from None


def _difference(found: Comparison, now: Comparison) -> str:
    """Names of the settings that differ."""
    return ", ".join(name for name, value in now.evaluation.items() if found.evaluation.get(name) != value)


def _windows(evaluation: Mapping[str, Any]) -> str:
    count = evaluation["max_windows"]
    return f"{'all' if count is None else count} windows of {evaluation['seq_len']} tokens"
