"""Progress: lines, costs, and where they go."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest
from rich.console import Console

from bdq_export.progress import (
    InnerProgress,
    PlainProgress,
    QuietProgress,
    RichProgress,
    configure_logging,
    make_progress,
)


def test_plain_lines_are_start_quarters_and_end() -> None:
    stream = io.StringIO()
    with PlainProgress(stream).stage("gptq", total=30) as stage:
        for _ in range(30):
            stage.advance()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "gptq: started"
    assert [line.split(",")[0] for line in lines[1:4]] == ["gptq: 25 %", "gptq: 50 %", "gptq: 75 %"]
    assert all(re.search(r"about \d+ s left$", line) for line in lines[1:4])
    assert re.fullmatch(r"gptq: done in \d+\.\d s", lines[4])
    assert len(lines) == 5


def test_stage_that_fails_says_so_and_passes_the_exception_on() -> None:
    stream = io.StringIO()
    progress = PlainProgress(stream)
    with pytest.raises(KeyboardInterrupt), progress.stage("fold"):
        raise KeyboardInterrupt
    assert "fold: stopped after" in stream.getvalue()
    assert [cost.name for cost in progress.stages()] == ["fold"]


def test_an_inner_progress_shows_on_the_outer_one_and_counts_by_itself() -> None:
    stream = io.StringIO()
    outer = PlainProgress(stream)
    runs = [InnerProgress(outer) for _ in range(2)]
    for run in runs:
        with run.stage("gptq", total=2) as stage:
            stage.advance()
            time.sleep(0.02)
    with pytest.raises(KeyboardInterrupt), runs[1].stage("fold"):
        raise KeyboardInterrupt
    lines = [re.sub(r"\d+\.\d s|about.*", "", line) for line in stream.getvalue().splitlines()]
    assert lines == [
        *["gptq: started", "gptq: 50 %, ", "gptq: done in "] * 2,
        *["fold: started", "fold: stopped after "],
    ]
    assert [[cost.name for cost in run.stages()] for run in runs] == [["gptq"], ["gptq", "fold"]]
    assert outer.stages()[0].seconds > 0.04
    assert all(0.02 <= run.stages()[0].seconds < outer.stages()[0].seconds for run in runs)


def test_costs_are_added_up_by_name_in_order_of_begin() -> None:
    progress = QuietProgress()
    for _ in range(2):
        with progress.stage("outer"), progress.stage("inner"):
            time.sleep(0.02)
    outer, inner = progress.stages()
    assert (outer.name, inner.name) == ("outer", "inner")
    assert outer.seconds >= inner.seconds >= 0.04


def test_peak_memory_sees_what_is_freed_again() -> None:
    progress = QuietProgress()
    with progress.stage("small"):
        pass
    with progress.stage("big"):
        held = bytearray(b"\1") * (300 << 20)
        time.sleep(0.15)
        del held
    with progress.stage("after"):
        pass
    small, big, after = progress.stages()
    assert big.peak_bytes - small.peak_bytes > 250 << 20
    assert big.peak_bytes - after.peak_bytes > 250 << 20


def test_rich_bars_write_to_their_console_and_nest(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    progress = RichProgress(Console(file=stream, force_terminal=True, width=100))
    with progress.stage("calibrate", total=2) as outer:
        outer.advance()
        with progress.stage("layer"):
            pass
    with progress.stage("package"):
        pass
    text = stream.getvalue()
    assert "calibrate" in text
    assert "layer" in text
    assert "package" in text
    assert "1/2" in text
    assert capsys.readouterr().out == ""


def test_choice_follows_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make_progress(quiet=True), QuietProgress)
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    assert isinstance(make_progress(), PlainProgress)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert isinstance(make_progress(), RichProgress)


def test_log_records_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    try:
        logging.getLogger("bdq_export.package").info("written")
        configure_logging(quiet=True)
        logging.getLogger("bdq_export.package").info("hidden")
    finally:
        logging.getLogger("bdq_export").handlers = []
        logging.getLogger("bdq_export").propagate = True
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "INFO: written\n"
