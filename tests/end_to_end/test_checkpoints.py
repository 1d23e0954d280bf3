"""`--checkpoints`: a run that was killed goes on, to the same bytes; another one is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

QUICK = ("--calib-samples", "4", "--calib-seq-len", "32", "--min-top1", "0", "--scheme", "w4a8", "--transform", "bdq")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_to_the_same_bytes(
    bdq: Callable[..., Any], sources: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    progress, arguments = tmp_path / "progress", ["export", str(sources / "model"), *QUICK, "--ops", "bdq"]
    program = "from bdq_export.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments[:2], str(tmp_path / "out"), *arguments[2:]]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["TMPDIR"] = str(_made(tmp_path / "temporary"))
    with subprocess.Popen([*command, "--checkpoints", str(progress), "--quiet"], env=environment) as process:
        while process.poll() is None and not (progress / "gptq-block-0000.json").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    before = (progress / "gptq-block-0000.safetensors").stat().st_mtime_ns
    assert bdq(*arguments, "--checkpoints", progress, tmp_path / "resumed").code == 0
    assert (progress / "gptq-block-0000.safetensors").stat().st_mtime_ns == before, "it was done again"
    assert bdq(*arguments, tmp_path / "whole").code == 0
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = [*arguments, "--checkpoints", progress, tmp_path / "other"]
    line = refused(2, *other, "--seed", "5")
    assert "seed was 0, is 5" in line
    # What is used after calibration only may change.
    assert bdq(*other, "--full-logits").code == 0


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
