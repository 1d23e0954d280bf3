"""Ctrl-C in any stage leaves nothing, and leaves an earlier export as it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bdq_export.progress import QuietProgress, Stage

QUICK = ("--calib-samples", "4", "--calib-seq-len", "32", "--min-top1", "0")  # as for `exported`: the same stages
STAGES = (
    "read model",
    "load weights",
    "calibration text",
    "statistics",
    "choose transform",
    "gptq without a transform",
    "gptq",
    "build float graph",
    "check float graph",
    "quantize graph",
    "write",
    "verify",
)


class _Interrupted(QuietProgress):
    """Ctrl-C at the end of a stage, when there is most to clean up."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    @contextmanager
    def stage(self, name: str, total: float | None = None) -> Iterator[Stage]:
        with super().stage(name, total) as stage:
            yield stage
            if name == self._name:
                raise KeyboardInterrupt


def _stages(exported: Path) -> list[str]:
    return [stage["name"] for stage in json.loads((exported / "bdq_report.json").read_text())["stages"]]


def test_every_stage_is_interrupted_below(sources: Path) -> None:
    assert set(_stages(sources / "exported")) <= set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_interrupt_in_each_stage(
    stage: str,
    sources: Path,
    exported: Path,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if stage not in _stages(exported):
        pytest.skip("this model needs no such stage")
    monkeypatch.setattr("bdq_export.commands.export.make_progress", lambda quiet: _Interrupted(stage))
    # `refused` sees that the files of the earlier export, and all else, are as they were
    assert "interrupted" in refused(130, "export", sources / "model", exported, "--force", *QUICK)


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no such signals to one process")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_real_signal(number: int, code: int, sources: Path, tmp_path: Path, scratch: Path) -> None:
    flags = ["--transform", "none", "--calib-seq-len", "256", "--calib-samples", "64"]
    program = "from bdq_export.cli import main; main()"
    command = [sys.executable, "-c", program, "export", str(sources / "model"), str(tmp_path / "out"), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("calibration text: 25 %"):
                process.send_signal(number)
        out = process.stdout.read() if process.stdout else ""
    assert process.returncode == code, lines
    assert out == ""
    assert "Traceback" not in "".join(lines)
    assert sum(line.startswith("error: ") for line in lines) == (number == signal.SIGINT)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert list(scratch.iterdir()) == []
