"""The rows of a comparison as one table: the mean over seeds, and ± the spread where there are several."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bdq_export.comparison.rows import Row, Summary, summarize


@dataclass(frozen=True)
class Column:
    """One figure.

    Attributes:
        figure: its name.
        title: in the table's head.
        digits: behind the point.
        scale: the number is multiplied by it.
    """

    figure: str
    title: str
    digits: int
    scale: float = 1.0

    def cell(self, summary: Summary) -> str:
        """The mean, and ± the spread of several seeds."""
        mean, spread = summary.mean.get(self.figure), summary.spread.get(self.figure)
        if mean is None:
            return "-"
        return self._shown(mean) if spread is None else f"{self._shown(mean)} ± {self._shown(spread)}"

    def _shown(self, value: float) -> str:
        value *= self.scale
        return f"{value:.{self.digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


_QUALITY = (
    Column("perplexity", "perplexity", 3),
    Column("ratio", "ratio", 4),
    Column("gap", "gap", 3),
    Column("kl", "KL", 4),
    Column("top1", "top-1 %", 1, 100),
)
_COST = (
    Column("activation_flatness", "flatness x", 3),
    Column("weight_flatness", "flatness W", 3),
    Column("seconds", "s", 0),
    Column("peak_bytes", "peak GB", 2, 1e-9),
    Column("model_bytes", "MB", 1, 1e-6),
)
_LEGEND = (
    "ratio and gap = ln(ratio): perplexity against the float model's; KL(float ‖ exported): nats a token; top-1: same "
    "most likely token as the float model; flatness: mean over sites after the transforms, 0 is flat; s and peak GB: "
    "of the export. ± is the sample standard deviation over seeds."
)


def cells(rows: Iterable[Row]) -> tuple[list[str], list[list[str]]]:
    """Titles, and a line for each scheme and method; figures that no row has are left out."""
    found = list(rows)
    summaries = summarize(found)
    present = {name for each in summaries for name, value in each.mean.items() if value is not None}
    tasks = [name for name in dict.fromkeys(n for each in summaries for n in each.mean) if "." in name]
    task_columns = [
        Column(name, f"{name.replace('.accuracy_norm', ' norm').replace('.accuracy', '')} %", 1, 100) for name in tasks
    ]
    columns = [column for column in (*_QUALITY, *task_columns, *_COST) if column.figure in present]
    asked: dict[tuple[str, str], int] = {}
    for row in found:
        asked[row.scheme, row.method] = asked.get((row.scheme, row.method), 0) + 1
    lines = []
    for each in summaries:
        count = asked[each.scheme, each.method]
        seeds = str(count) if len(each.seeds) == count else f"{len(each.seeds)} of {count}"
        lines.append([each.scheme, each.method, seeds, *(column.cell(each) for column in columns)])
    return ["scheme", "method", "seeds", *(column.title for column in columns)], lines


def markdown(title: str, rows: Sequence[Row]) -> str:
    """A heading, the table, and why rows are missing."""
    titles, lines = cells(rows)
    floats = next((value for row in rows if (value := row.figures.get("float_perplexity")) is not None), None)
    parts = [f"# {title}", ""]
    if floats is not None:
        parts += [f"Perplexity of the float model: {floats:.3f}.", ""]
    parts += [_line(titles), "|" + "---|" * len(titles), *map(_line, lines), "", _LEGEND, ""]
    failed = [row for row in rows if row.error is not None]
    if failed:
        parts += ["Not measured:", ""]
        parts += [f"- {row.scheme}, {row.method}, seed {row.seed}: {row.error}" for row in failed]
        parts.append("")
    return "\n".join(parts)


def _line(texts: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
