"""`bdq eval`: perplexity and zero-shot accuracy of an exported model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from bdq_export.commands.runtime_errors import invalid_input, require_at_least
from bdq_export.errors import InvalidInputError, MissingDependencyError, UsageError

if TYPE_CHECKING:
    from bdq_export.progress import Progress
    from bdq_runtime.model import LanguageModel
    from bdq_runtime.perplexity import PerplexityResult, Reference
    from bdq_runtime.tasks import Row, TaskResult
    from bdq_runtime.tokenizer import TextTokenizer


SEQ_LEN = 1024
"""Tokens of a window, unless told otherwise."""


@dataclass(frozen=True)
class EvaluateResult:
    """Quality of a model.

    Attributes:
        model: the ONNX file.
        text: the text file; None when only tasks were asked for.
        perplexity: over the text, and against the reference if one was given.
        begins_windows: whether each window starts with the token(s) this tokenizer puts before a text.
        reference: the float model compared with.
        tasks: one entry for each task file.
        seconds: of the evaluation, without loading.
    """

    model: str
    text: str | None
    perplexity: PerplexityResult | None
    begins_windows: bool
    reference: str | None
    tasks: tuple[TaskResult, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def evaluate(
    model: str | Path,
    text: str | Path | None = None,
    seq_len: int | None = None,
    max_windows: int | None = None,
    reference: str | Path | None = None,
    tasks: Sequence[str | Path] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> EvaluateResult:
    """Perplexity of a text and zero-shot accuracy, measured on the exported file itself.

    Args:
        model: `OUT.onnx`, or a folder that holds `model.onnx`, with its tokenizer beside it.
        text: UTF-8 file; perplexity is taken over windows that do not overlap, their first token unscored.
        seq_len: tokens of a window; None is 1024.
        max_windows: stop after so many; None reads the whole text.
        reference: the float model (a folder, a `.gguf` file or a hub id); adds its perplexity, the KL divergence
            from it and top-1 agreement with it. Needs `bdq-export[export]`.
        tasks: JSON-lines files (see `bdq_runtime.tasks`).
        threads: CPU threads; None for all cores.
        progress: shows and times the stages.

    Raises:
        UsageError: nothing to measure, an option out of range, or what is for a text without one.
        InvalidInputError: a file that is missing, empty, not text, too short or malformed.
        MissingDependencyError: a reference, and torch is not installed.
    """
    _check_options(text, seq_len, max_windows, reference, tasks, threads)
    tokens = SEQ_LEN if seq_len is None else seq_len
    from bdq_export.progress import QuietProgress
    from bdq_runtime.perplexity import windows_of
    from bdq_runtime.tasks import load_rows

    shown = progress or QuietProgress()
    content = None if text is None else read_text(Path(text))
    with invalid_input():
        rows = {Path(task): load_rows(task) for task in tasks}
    with ExitStack() as stack:
        loaded, tokenizer = _open(model, threads)
        beginning = tokenizer.beginning()
        if loaded.context_length is not None and text is not None and tokens > loaded.context_length:
            raise UsageError(f"--seq-len is {tokens}, the model's context is {loaded.context_length}; ask for less")
        windows = None
        if content is not None:
            with invalid_input():
                windows = windows_of(tokenizer.encode(content), tokens, max_windows, beginning)
        float_model = None if reference is None else _load_reference(reference, stack)
        start = time.perf_counter()
        measured = None if windows is None else _measure(loaded, windows, float_model, shown)
        scores = tuple(_score(loaded, tokenizer, file, found, shown) for file, found in rows.items())
        seconds = time.perf_counter() - start
    return EvaluateResult(
        model=str(loaded.folder.model),
        text=None if text is None else str(text),
        perplexity=measured,
        begins_windows=bool(beginning),
        reference=None if reference is None else str(reference),
        tasks=scores,
        seconds=seconds,
    )


def _check_options(
    text: str | Path | None,
    seq_len: int | None,
    max_windows: int | None,
    reference: str | Path | None,
    tasks: Sequence[str | Path],
    threads: int | None,
) -> None:
    require_at_least("--seq-len", seq_len, 2)
    require_at_least("--max-windows", max_windows, 1)
    require_at_least("--threads", threads, 1)
    if text is None and not tasks:
        raise UsageError("nothing to evaluate; give --text FILE, --tasks FILE.jsonl, or both")
    if text is None and reference is not None:
        raise UsageError("--reference is compared on a text; give --text FILE too")
    for name, value in (("--seq-len", seq_len), ("--max-windows", max_windows)):
        if text is None and value is not None:
            raise UsageError(f"{name} cuts a text into windows, but there is none; give --text FILE, or leave it out")


def _open(model: str | Path, threads: int | None) -> tuple[LanguageModel, TextTokenizer]:
    from bdq_runtime.folder import ModelFolder
    from bdq_runtime.model import LanguageModel
    from bdq_runtime.tokenizer import TextTokenizer

    with invalid_input():
        folder = ModelFolder.of(model)
        tokenizer = TextTokenizer(folder.directory)  # first: no model is loaded for want of a tokenizer
        return LanguageModel(folder.model, threads=threads), tokenizer


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InvalidInputError: missing, empty or not text.
    """
    if not path.is_file():
        raise InvalidInputError(f"text file {path} does not exist; give a UTF-8 text")
    data = path.read_bytes()
    if not data.strip():
        raise InvalidInputError(f"text file {path} is empty; give a UTF-8 text")
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"text file {path} is not UTF-8 (byte {error.start}); give a UTF-8 text") from None
    if "\x00" in content:
        raise InvalidInputError(f"text file {path} is binary (it holds zero bytes); give a UTF-8 text")
    return content.replace("\r\n", "\n")


def _load_reference(reference: str | Path, stack: ExitStack) -> Reference:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f'--reference needs the package {error.name}; install it with: pip install "bdq-export[export]"'
        ) from None
    from bdq_export.checkpoint import open_checkpoint
    from bdq_export.float_model import load_float_model
    from bdq_export.verify import torch_reference

    folder = Path(stack.enter_context(TemporaryDirectory(prefix="bdq-reference-")))
    checkpoint = open_checkpoint(reference, folder)
    return torch_reference(load_float_model(checkpoint, checkpoint.weights()))


def _measure(model: LanguageModel, windows: Any, reference: Reference | None, progress: Progress) -> PerplexityResult:
    from bdq_runtime.perplexity import measure_perplexity

    with progress.stage("perplexity", total=len(windows)) as stage, invalid_input():
        return measure_perplexity(model, windows, reference, lambda _: stage.advance())


def _score(
    model: LanguageModel, tokenizer: TextTokenizer, file: Path, rows: Sequence[Row], progress: Progress
) -> TaskResult:
    from bdq_runtime.tasks import evaluate_task

    with progress.stage(file.stem, total=len(rows)) as stage, invalid_input():
        return evaluate_task(model, tokenizer, rows, file.stem, lambda _: stage.advance())


def render(result: EvaluateResult) -> RenderableType:
    """Tables for a terminal."""
    parts = []
    if result.perplexity is not None:
        parts.append(_perplexity_table(result.perplexity, result.model))
    if result.tasks:
        table = Table("task", "rows", "accuracy", "acc_norm", "target perplexity", title="zero-shot tasks")
        for task in result.tasks:
            table.add_row(
                task.name,
                str(task.rows),
                f"{task.accuracy:.2%} ± {task.accuracy_stderr:.2%}",
                "" if task.accuracy_norm is None else f"{task.accuracy_norm:.2%}",
                "" if task.target_perplexity is None else f"{task.target_perplexity:.2f}",
            )
        parts.append(table)
    return Group(*parts)


def _perplexity_table(found: PerplexityResult, title: str) -> Table:
    table = Table(title=title, show_header=False, title_justify="left")
    table.add_row("perplexity", f"{found.perplexity:.4f}")
    table.add_row("scored", f"{found.scored_tokens:,} tokens, {found.windows} windows of {found.seq_len}")
    if found.reference_perplexity is not None:
        table.add_row("float model's perplexity", f"{found.reference_perplexity:.4f}")
        table.add_row("ratio", f"{found.perplexity / found.reference_perplexity:.4f}")
        table.add_row("KL from the float model", f"{found.kl_divergence:.5f} nats a token")
        table.add_row("same most likely token", f"{found.top1_agreement:.2%}")
    return table
