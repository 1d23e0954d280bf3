"""The command as torchrun starts it: one export, one voice, and one line where it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = (
    "--scheme",
    "w4a16",
    "--transform",
    "none",
    "--calib-samples",
    "10",
    "--calib-seq-len",
    "32",
    "--min-top1",
    "0",
)


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "bdq_export", "export", *map(str, arguments), *QUICK]
    return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=600, check=False)


@pytest.mark.slow
def test_two_processes_write_one_export(sources: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress"
    done = torchrun(sources / "model", tmp_path / "out", "--json", "--checkpoints", progress)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["paths"][0] == str(tmp_path / "out" / "model.onnx")
    assert done.stderr.count("gptq: started") == 1
    failed = torchrun(sources / "model", tmp_path / "other", "--checkpoints", progress, "--seed", "5")
    assert failed.returncode == 1, "torchrun's own code"
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "seed was 0, is 5" in lines[0]
    assert "(exitcode: 2)" in failed.stderr
    assert not (tmp_path / "other").exists()
