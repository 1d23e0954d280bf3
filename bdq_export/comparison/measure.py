"""One export, measured on the file that was written."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdq_export.commands.evaluate import EvaluateResult, evaluate
from bdq_export.commands.export import export_with
from bdq_export.comparison.rows import Figures
from bdq_export.options import ExportOptions
from bdq_export.process_memory import give_back_memory
from bdq_export.progress import InnerProgress, Progress


@dataclass(frozen=True)
class Evaluation:
    """What every export of a comparison is measured on.

    Attributes:
        text: UTF-8 file for perplexity, KL and top-1 agreement, or None.
        seq_len: tokens of a window.
        max_windows: stop after so many.
        tasks: zero-shot files.
        threads: CPU threads; None for all cores.
    """

    text: Path | None
    seq_len: int
    max_windows: int | None
    tasks: tuple[Path, ...] = ()
    threads: int | None = None

    def describe(self) -> dict[str, Any]:
        """What decides the figures, by content: names of files are for people."""
        text = None if self.text is None else {"name": self.text.name, "sha256": _digest(self.text)}
        return {
            "text": text,
            "seq_len": self.seq_len,
            "max_windows": self.max_windows,
            "tasks": {path.stem: _digest(path) for path in self.tasks},
        }


def measure_export(
    model_dir: str | Path, folder: Path, options: ExportOptions, evaluation: Evaluation, progress: Progress
) -> tuple[str, Figures]:
    """The transform and the figures of an export that is written to `folder` (see `Row`).

    Seconds are those of the whole export, its verification included; memory is the peak of its stages, without the
    evaluation.

    Raises:
        BdqError: of the export or the evaluation.
    """
    give_back_memory()  # what is left of the last export is not this one's
    start = time.perf_counter()
    exported = export_with(model_dir, folder, options, force=True, progress=InnerProgress(progress))
    seconds = time.perf_counter() - start
    report = json.loads((folder / "bdq_report.json").read_text(encoding="utf-8"))
    found = evaluate(
        folder,
        text=evaluation.text,
        seq_len=None if evaluation.text is None else evaluation.seq_len,
        max_windows=None if evaluation.text is None else evaluation.max_windows,
        reference=None if evaluation.text is None else model_dir,
        tasks=evaluation.tasks,
        threads=evaluation.threads,
        progress=InnerProgress(progress),
    )
    figures = {
        **_quality(found),
        "activation_flatness": _mean_flatness(report["flatness"]),
        "weight_flatness": _mean_flatness(report["weight_flatness"]),
        "seconds": seconds,
        "peak_bytes": float(exported.metrics["peak_memory_bytes"]),
        "model_bytes": float(exported.metrics["model_bytes"]),
    }
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}
    return report["transform"], finite


def _quality(found: EvaluateResult) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    if found.perplexity is not None:
        ours, floats = found.perplexity.perplexity, found.perplexity.reference_perplexity
        assert floats is not None, "a reference was given"
        figures = {
            "perplexity": ours,
            "float_perplexity": floats,
            "ratio": ours / floats,
            "gap": math.log(ours / floats),
            "kl": found.perplexity.kl_divergence,
            "top1": found.perplexity.top1_agreement,
        }
    for task in found.tasks:
        figures[f"{task.name}.accuracy"] = task.accuracy
        if task.accuracy_norm is not None:
            figures[f"{task.name}.accuracy_norm"] = task.accuracy_norm
    return figures


def _mean_flatness(sites: Sequence[Mapping[str, Any]]) -> float | None:
    """Over sites, after the transforms; None where no site was looked at."""
    return sum(site["after"] for site in sites) / len(sites) if sites else None


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
