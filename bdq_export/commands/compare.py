"""`bdq compare`: many methods, schemes and seeds in one harness and one table."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bdq_export
from bdq_export import parallel
from bdq_export.commands.evaluate import read_text
from bdq_export.commands.runtime_errors import invalid_input, require_at_least
from bdq_export.comparison.methods import DEFAULT, Method, parse_method
from bdq_export.comparison.rows import Row, Summary, summarize
from bdq_export.comparison.store import JSON_NAME, MARKDOWN_NAME, Comparison, open_comparison, save
from bdq_export.errors import BdqError, InvalidInputError, UsageError
from bdq_export.options import ExportOptions
from bdq_export.progress import Progress, make_progress
from bdq_export.resume.fingerprint import FORMAT, calib_hash, tokenizer_hash
from bdq_export.scheme import QuantScheme
from bdq_export.system_errors import resource_errors

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bdq_export.checkpoint import Checkpoint
    from bdq_export.comparison.measure import Evaluation

logger = logging.getLogger(__name__)

EXPORTS = "exports"
"""Folder, below that of the comparison, of the exports."""


@dataclass(frozen=True)
class CompareResult:
    """A comparison, whole.

    Attributes:
        folder: with `compare.json` and `compare.md`.
        comparison: all rows that the folder has.
        measured: places (scheme, method, seed) that this run has exported, or tried to; the others were there.
        failed: what went wrong in this run. A failure is a row of `comparison` only where there were no figures before.
    """

    folder: Path
    comparison: Comparison
    measured: tuple[tuple[str, str, int], ...]
    failed: tuple[Row, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """One for each scheme, method and seed."""
        return self.comparison.rows

    @property
    def summary(self) -> tuple[Summary, ...]:
        """Mean and spread over seeds."""
        return summarize(self.comparison.rows)

    @property
    def all_failed(self) -> bool:
        """Whether this run tried to measure something, and got nothing."""
        return bool(self.measured) and set(self.measured) <= {row.place for row in self.failed}

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        paths = [str(self.folder / name) for name in (JSON_NAME, MARKDOWN_NAME)]
        return {
            "paths": paths,
            "measured": [list(place) for place in self.measured],
            "failed": [{"place": list(row.place), "error": row.error} for row in self.failed],
            **self.comparison.to_dict(),
        }

    def render(self) -> RenderableType:
        """A table for people."""
        from rich.console import Group
        from rich.table import Table

        from bdq_export.comparison.table import cells

        titles, lines = cells(self.rows)
        table = Table(*titles, title=self.comparison.model)
        for line in lines:
            table.add_row(*line)
        failed = {row.place: f"{_named(row)}: {row.error}" for row in self.rows if row.error}
        for row in self.failed:
            failed.setdefault(row.place, f"{_named(row)}: {row.error} (the row is of earlier options)")
        return Group(table, *failed.values(), str(self.folder / MARKDOWN_NAME))


@dataclass(frozen=True)
class _Job:
    """A row to measure: `options`, or why there are none."""

    scheme: str
    method: str
    seed: int
    options: ExportOptions | None
    refusal: str | None = None

    @property
    def place(self) -> tuple[str, str, int]:
        return self.scheme, self.method, self.seed


def compare(
    model_dir: str | Path,
    out: str | Path,
    *,
    schemes: Sequence[str] = ("w4a4kv4",),
    methods: Sequence[str] = DEFAULT,
    seeds: Sequence[int] = (0,),
    text: str | Path | None = None,
    seq_len: int = 1024,
    max_windows: int | None = None,
    tasks: Sequence[str | Path] = (),
    calib: str = "self",
    calib_samples: int | None = None,
    calib_seq_len: int | None = None,
    threads: int | None = None,
    keep_exports: bool = False,
    quiet: bool = True,
    progress: Progress | None = None,
) -> CompareResult:
    """Export a model by each method, scheme and seed, and measure every file in the same way.

    A row that `out` already has with the same options and version is not measured again; with other options it is, and
    replaced once there are new figures; a failed one is tried again. Rows of another model, tokenizer, text or tasks
    are refused.

    Args:
        model_dir: Hugging Face directory (safetensors), hub id, or .gguf file.
        out: folder for `compare.json` and `compare.md`, rewritten after each row.
        schemes: bits.
        methods: `NAME[+option=value ...]`, see `bdq_export.comparison.methods`.
        seeds: of every random choice; several give a spread.
        text: UTF-8 file for perplexity, KL to the float model and top-1 agreement with it.
        seq_len: tokens of a window.
        max_windows: stop after so many; None reads the whole text.
        tasks: zero-shot files (see `bdq_runtime.tasks`).
        calib: "self" or a text file, for all methods that do not say otherwise.
        calib_samples: number of calibration sequences.
        calib_seq_len: tokens in each; None is 512, or the model's context where that is shorter.
        threads: CPU threads of the evaluation.
        keep_exports: leave the exported models in `out`/exports instead of deleting each once it is measured.
        quiet: no progress on stderr.
        progress: shows the stages, instead of the default one.

    Raises:
        UsageError: an unknown method or scheme, options that every scheme refuses, rows that are not comparable, or
            several processes.
        BdqError: the model, the text or a task cannot be used. What goes wrong with one export is in `failed`.
    """
    from bdq_export.commands.export import require_packages
    from bdq_export.comparison.measure import Evaluation
    from bdq_export.preflight import check_separate

    parallel.refuse_several("bdq compare")
    require_packages()
    require_at_least("--seq-len", seq_len, 2)
    require_at_least("--max-windows", max_windows, 1)
    require_at_least("--threads", threads, 1)
    shared = {"calib": calib, "calib_samples": calib_samples, "calib_seq_len": calib_seq_len}
    jobs = _jobs(schemes, methods, seeds, shared)
    if text is None and not tasks:
        raise UsageError("nothing to measure; give --text FILE, --tasks FILE.jsonl, or both")
    files = tuple(Path(task) for task in tasks)
    evaluation = Evaluation(None if text is None else Path(text), seq_len, max_windows, files, threads)
    folder = Path(out)
    check_separate(Path(model_dir), folder)
    keys = [_key(job) for job in jobs]
    empty = _checked(model_dir, evaluation, [job.options for job in jobs if job.options is not None])
    _make(folder)
    comparison = open_comparison(folder, empty)
    measured, failed = [], []
    shown = progress or make_progress(quiet)
    with shown.stage("compare", total=len(jobs)) as stage:
        for job, key in zip(jobs, keys, strict=True):
            before = comparison.row_at(job.place)
            if before is None or before.key != key or before.error is not None:
                row = _measure(job, key, model_dir, folder, evaluation, keep_exports, shown)
                if row.error is not None:
                    failed.append(row)
                if row.error is None or before is None or before.error is not None:  # else the figures stay
                    comparison = comparison.with_row(row)
                    save(folder, comparison)
                if job.options is not None:
                    measured.append(job.place)
            stage.advance()
    with suppress(OSError):  # not empty: exports are kept
        (folder / EXPORTS).rmdir()
    return CompareResult(folder, comparison, tuple(measured), tuple(failed))


def _jobs(
    schemes: Sequence[str], methods: Sequence[str], seeds: Sequence[int], shared: Mapping[str, Any]
) -> list[_Job]:
    for name, given in (("schemes", schemes), ("methods", methods), ("seeds", seeds)):
        if not given:
            raise UsageError(f"--{name} is empty; give at least one")
    bits = list(dict.fromkeys(str(QuantScheme.parse(scheme)) for scheme in schemes))
    ways = [parse_method(method) for method in dict.fromkeys(methods)]
    jobs = [_job(way, scheme, seed, shared) for scheme in bits for way in ways for seed in dict.fromkeys(seeds)]
    for way in ways:
        own = [job for job in jobs if job.method == way.name]
        if all(job.options is None for job in own):
            raise UsageError(f"method {way.name}: {own[0].refusal}")
    return jobs


def _job(way: Method, scheme: str, seed: int, shared: Mapping[str, Any]) -> _Job:
    try:
        return _Job(scheme, way.name, seed, way.options(scheme, seed, shared))
    except UsageError as error:
        return _Job(scheme, way.name, seed, None, str(error))


def _checked(model_dir: str | Path, evaluation: Evaluation, exports: Sequence[ExportOptions]) -> Comparison:
    """A comparison without rows, once model, text and tasks are known to be usable."""
    from bdq_export.checkpoint import open_checkpoint
    from bdq_export.quantize.specs import with_sequence_length
    from bdq_runtime.tasks import load_rows

    with invalid_input():
        for task in evaluation.tasks:
            load_rows(task)
    names = [task.stem for task in evaluation.tasks]
    if len(set(names)) < len(names):
        raise UsageError(f"--tasks has two files of one name among {', '.join(names)}; rename one")
    content = None if evaluation.text is None else read_text(evaluation.text)
    with tempfile.TemporaryDirectory(prefix="bdq-compare-") as work:
        checkpoint = open_checkpoint(Path(model_dir), Path(work))
        for options in exports:
            with_sequence_length(options, checkpoint.dimensions)
        if content is not None:
            _check_windows(checkpoint, content, evaluation)
        described = {**evaluation.describe(), "tokenizer": tokenizer_hash(checkpoint)}
        return Comparison(checkpoint.directory.name, checkpoint.content_hash(), described)


def _check_windows(checkpoint: Checkpoint, content: str, evaluation: Evaluation) -> None:
    """The text has a window, and the model room for it: told before hours of exporting."""
    from bdq_runtime.perplexity import windows_of
    from bdq_runtime.tokenizer import TextTokenizer

    limit = checkpoint.dimensions.context_length
    if limit is not None and evaluation.seq_len > limit:
        raise UsageError(f"--seq-len is {evaluation.seq_len}, the model's context is {limit}; ask for less")
    with invalid_input():
        tokenizer = TextTokenizer(checkpoint.directory)
        windows_of(tokenizer.encode(content), evaluation.seq_len, evaluation.max_windows, tokenizer.beginning())


def _named(row: Row) -> str:
    return f"{row.scheme}, {row.method}, seed {row.seed}"


def _make(folder: Path) -> None:
    try:
        (folder / EXPORTS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"--out {folder} cannot be made a folder: {error.strerror}") from None


def _key(job: _Job) -> str:
    """Of everything but the model that decides a row's figures; empty where nothing is exported."""
    if job.options is None:
        return ""
    values = {**asdict(job.options), "calib": calib_hash(job.options.calib)}
    values |= {"calib_samples": job.options.samples, "calib_seq_len": job.options.seq_len}
    values |= {"version": bdq_export.__version__, "calibration": FORMAT}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _measure(
    job: _Job,
    key: str,
    model_dir: str | Path,
    folder: Path,
    evaluation: Evaluation,
    keep: bool,
    progress: Progress,
) -> Row:
    if job.options is None:
        return Row(*job.place, key, error=job.refusal)
    from bdq_export.comparison.measure import measure_export

    options = {**asdict(job.options), "keep": list(job.options.keep), "calib": Path(job.options.calib).name}
    label = re.sub(r"[^A-Za-z0-9.=-]+", "_", job.method)[:60]
    export = folder / EXPORTS / f"{job.scheme}-{label}-{job.seed}-{key[:8]}"
    try:
        with progress.stage(f"{job.scheme} {job.method} seed {job.seed}"), resource_errors():
            transform, figures = measure_export(model_dir, export, job.options, evaluation, progress)
    except BdqError as error:
        return Row(*job.place, key, options, error=str(error))
    except Exception as error:  # one broken export must not cost the hours of the others
        logger.debug("%s", job.place, exc_info=True)
        line = " ".join(str(error).split())[:300]
        return Row(*job.place, key, options, error=f"unexpected {type(error).__name__}: {line}")
    finally:
        if not keep and export.is_dir():
            shutil.rmtree(export)
    return Row(*job.place, key, options, transform, figures)
