"""A machine that only runs models has onnxruntime, numpy and tokenizers: everything but exporting works there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ABSENT = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "mobius",
    "safetensors",
    "gguf",
    "psutil",
    "numba",
)

PROGRAM = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
absent, commands = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(absent))  # importing any of them is an ImportError
from bdq_export.cli import main
results = []
for command in commands:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(command)
        except SystemExit as stop:
            code = stop.code
    results.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def test_without_the_export_packages(sources: Path, exported: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some text that is long enough for a window. " * 4)
    model, out = str(exported), str(tmp_path / "out")
    measured = ["eval", model, "--text", str(text), "--seq-len", "64", "--quiet", "--json"]
    commands = [
        ["--help"],
        ["run", model, "--prompt", "a", "--max-new-tokens", "3"],
        ["bench", model, "--prompt-len", "8", "--new-tokens", "2", "--json"],
        measured,
        ["export", str(sources / "model"), out],
        ["export", str(sources / "model"), out, "--dry-run"],
        [*measured, "--reference", str(sources / "model")],
        ["inspect", model],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([ABSENT, commands])],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        check=True,
    )
    helped, ran, timed, evaluated, *refusals = json.loads(done.stdout)
    assert "export" in helped[1]
    for code, shown, error in (helped, ran, timed, evaluated):
        assert (code, error) == (0, "")
        assert shown.strip()
    assert json.loads(timed[1])["decode_tokens_per_second"] > 0
    assert json.loads(evaluated[1])["perplexity"]["windows"] == 2
    for code, shown, error in refusals:
        assert (code, shown) == (7, "")
        assert len(error.splitlines()) == 1
        assert "bdq-export[export]" in error
    assert "torch, transformers, onnx" in refusals[0][2]
    assert not Path(out).exists()
