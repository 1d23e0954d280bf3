"""What one export of a comparison measured, and the mean and spread over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Figures = Mapping[str, float | None]
"""Name -> number; None where it was not measured or is none."""


@dataclass(frozen=True)
class Row:
    """One export.

    Attributes:
        scheme: bits.
        method: label of the method.
        seed: of every random choice.
        key: of everything that decides the figures; empty where the options refused each other.
        options: every option of the export.
        transform: the transform that was chosen.
        figures: perplexity, ratio and gap (ln of the ratio) to the float model's, kl, top1, mean flatness, seconds and
            peak_bytes of the export, model_bytes, and `NAME.accuracy`, `NAME.accuracy_norm` of each task.
        error: why there are no figures; None where there are.
    """

    scheme: str
    method: str
    seed: int
    key: str
    options: Mapping[str, Any] = field(default_factory=dict)
    transform: str | None = None
    figures: Figures = field(default_factory=dict)
    error: str | None = None

    @property
    def place(self) -> tuple[str, str, int]:
        """A comparison has one row for each."""
        return self.scheme, self.method, self.seed


@dataclass(frozen=True)
class Summary:
    """All measured seeds of one method.

    Attributes:
        scheme: bits.
        method: label of the method.
        seeds: that were measured.
        mean: of each figure; None where a seed lacks it.
        spread: sample standard deviation (n - 1) of each; None for one seed.
    """

    scheme: str
    method: str
    seeds: tuple[int, ...]
    mean: Figures
    spread: Figures


def summarize(rows: Iterable[Row]) -> tuple[Summary, ...]:
    """One summary for each scheme and method that has figures, schemes together, each in the order of its first row."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.error is None:
            groups.setdefault(row.scheme, {}).setdefault(row.method, []).append(row)
    return tuple(
        _summary(scheme, method, found) for scheme, methods in groups.items() for method, found in methods.items()
    )


def _summary(scheme: str, method: str, rows: list[Row]) -> Summary:
    mean: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row.figures):
        values = [value for row in rows if (value := row.figures.get(name)) is not None]
        whole = len(values) == len(rows)  # the mean of some would hide that others have none
        mean[name] = statistics.fmean(values) if whole else None
        spread[name] = statistics.stdev(values) if whole and len(values) > 1 else None
    return Summary(scheme, method, tuple(row.seed for row in rows), mean, spread)
