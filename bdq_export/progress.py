"""What a run is doing, on stderr, and what each stage cost.

    progress = make_progress(quiet=False)
    with progress.stage("gptq", total=30) as stage:
        for block in blocks:
            ...
            stage.advance()
    progress.stages()        # (StageCost("gptq", seconds, peak_bytes),)

Standard output carries results only: bars, lines and log records all go to stderr.
"""

from __future__ import annotations

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from bdq_export.process_memory import PeakMemory

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichBars
    from rich.progress import TaskID


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run took; stages of one name are added up (seconds) and maximised (memory)."""

    name: str
    seconds: float
    peak_bytes: int


class Stage(Protocol):
    """A running stage."""

    def advance(self, steps: float = 1) -> None:
        """Say that `steps` more of the stage's total are done."""


class Progress(Protocol):
    """Shows the stages of a run and records what they cost."""

    def stage(self, name: str, total: float | None = None) -> AbstractContextManager[Stage]:
        """A stage of `total` steps (None: unknown); stages may nest."""

    def stages(self) -> tuple[StageCost, ...]:
        """Costs of the stages that have ended, in the order in which they were first begun."""


class _View(Protocol):
    """How one implementation shows one stage."""

    def advance(self, steps: float = 1) -> None: ...

    def end(self, seconds: float, failed: bool) -> None: ...


class _SilentView:
    def advance(self, steps: float = 1) -> None:
        pass

    def end(self, seconds: float, failed: bool) -> None:
        pass


class _RecordingProgress(ABC):
    """Times the stages and measures their memory; subclasses show them."""

    def __init__(self) -> None:
        self._costs: dict[str, StageCost] = {}
        self._order: list[str] = []

    @abstractmethod
    def _begin(self, name: str, total: float | None) -> _View:
        """Show that a stage begins."""

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        if name not in self._order:
            self._order.append(name)
        view = self._begin(name, total)
        started = time.perf_counter()
        failed = True
        memory = PeakMemory()
        try:
            with memory:
                yield view
            failed = False
        finally:
            seconds = time.perf_counter() - started
            before = self._costs.get(name, StageCost(name, 0.0, 0))
            peak = max(before.peak_bytes, memory.peak_bytes)
            self._costs[name] = StageCost(name, before.seconds + seconds, peak)
            view.end(seconds, failed)

    def stages(self) -> tuple[StageCost, ...]:
        return tuple(self._costs[name] for name in self._order if name in self._costs)


class QuietProgress(_RecordingProgress):
    """Shows nothing."""

    def _begin(self, name: str, total: float | None) -> _View:
        return _SilentView()


class InnerProgress(_RecordingProgress):
    """Shows its stages on another's display and records its own costs only: for one of several runs in a row."""

    def __init__(self, outer: Progress) -> None:
        super().__init__()
        self._outer = outer

    def _begin(self, name: str, total: float | None) -> _View:
        return _InnerView(self._outer.stage(name, total))


class _InnerView:
    def __init__(self, context: AbstractContextManager[Stage]) -> None:
        self._context = context
        self._stage = context.__enter__()

    def advance(self, steps: float = 1) -> None:
        self._stage.advance(steps)

    def end(self, seconds: float, failed: bool) -> None:
        error = RuntimeError("the stage failed") if failed else None
        self._context.__exit__(None if error is None else RuntimeError, error, None)


class PlainProgress(_RecordingProgress):
    """One line when a stage begins, at 25, 50 and 75 %, and when it ends: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream

    def _begin(self, name: str, total: float | None) -> _View:
        return _PlainView(name, total, self._stream)


class _PlainView:
    def __init__(self, name: str, total: float | None, stream: TextIO | None) -> None:
        self._name, self._total, self._stream = name, total, stream
        self._done, self._quarter = 0.0, 0
        self._started = time.perf_counter()
        self._write("started")

    def advance(self, steps: float = 1) -> None:
        self._done += steps
        if not self._total:
            return
        quarter = min(int(4 * self._done / self._total + 1e-9), 3)
        if quarter > self._quarter:
            self._quarter = quarter
            left = (time.perf_counter() - self._started) * (self._total / self._done - 1)
            self._write(f"{25 * quarter} %, about {left:.0f} s left")

    def end(self, seconds: float, failed: bool) -> None:
        self._write(f"{'stopped after' if failed else 'done in'} {seconds:.1f} s")

    def _write(self, text: str) -> None:
        # sys.stderr is looked up at each line, because callers may redirect it between two stages
        print(f"{self._name}: {text}", file=self._stream or sys.stderr, flush=True)


class RichProgress(_RecordingProgress):
    """A live bar with the time left for each running stage, and one line that stays for each that ended."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
            redirect_stdout=False,  # results on stdout stay as they are, also when only stderr is a terminal
            transient=True,
        )
        self._open = 0

    def _begin(self, name: str, total: float | None) -> _View:
        if self._open == 0:
            self._bars.start()
        self._open += 1
        return _RichView(self, self._bars, name, self._bars.add_task("  " * (self._open - 1) + name, total=total))

    def closed(self) -> None:
        """Take the live display down when the outermost stage has ended."""
        self._open -= 1
        if self._open == 0:
            self._bars.stop()


class _RichView:
    def __init__(self, owner: RichProgress, bars: RichBars, name: str, task: TaskID) -> None:
        self._owner, self._bars, self._name, self._task = owner, bars, name, task

    def advance(self, steps: float = 1) -> None:
        self._bars.advance(self._task, steps)

    def end(self, seconds: float, failed: bool) -> None:
        self._bars.remove_task(self._task)
        mark = "[red]✗[/red]" if failed else "[green]✓[/green]"
        self._bars.console.print(f"{mark} {self._name} [dim]{seconds:.1f} s[/dim]", highlight=False)
        self._owner.closed()


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever sys.stderr is at that moment, so that records appear above a live bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        raise AttributeError("the stream is always sys.stderr")


def configure_logging(quiet: bool = False) -> None:
    """Send the project's log records to stderr: INFO and above, or with `quiet` only warnings."""
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("bdq_export", "bdq_passes", "bdq_runtime"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(logging.WARNING if quiet else logging.INFO)
        logger.propagate = False


def make_progress(quiet: bool = False) -> Progress:
    """The progress that fits stderr: nothing when `quiet`, bars on a terminal, else plain lines."""
    if quiet:
        return QuietProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()
