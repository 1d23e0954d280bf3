"""The programs of docs/deploy.md, as they are printed there, continue a prompt as `bdq_runtime` does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from bdq_export import export
from bdq_runtime.library import LibraryMissingError, library_path
from bdq_runtime.model import LanguageModel

ROOT = Path(__file__).resolve().parents[2]
PROMPT = list(range(40, 56))
COUNT = 8

pytestmark = pytest.mark.slow


def _program(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    return str(found)


def _run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _tokens(printed: str) -> list[int]:
    return [int(line) for line in printed.split()]


@pytest.fixture
def folder(model_dir: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny model with few-bit weights, activations and cache."""
    out = tmp_path / "out"
    options = {"calib_samples": 4, "calib_seq_len": 32, "min_top1": 0.0, "transform": "none", "weights": "rtn"}
    export(model_dir("llama3"), out, scheme="w4a4kv4", **options)
    return out


@pytest.fixture
def expected(folder: Path) -> list[int]:
    """What comes after the prompt."""
    model = LanguageModel(folder)
    tokens, feed = [], PROMPT
    for _ in range(COUNT):
        tokens.append(int(np.argmax(model.append(feed)[-1])))
        feed = tokens[-1:]
    return tokens


def _headers() -> Path:
    found = sorted(ROOT.glob("build/*/onnxruntime_headers/**/onnxruntime_cxx_api.h"))
    if not found:
        pytest.skip("the op library was not built here: no headers of ONNX Runtime")
    return found[0].parent


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_cpp(folder: Path, expected: list[int], tmp_path: Path) -> None:
    try:
        library_path()
    except LibraryMissingError:
        pytest.skip("the op library was not built")
    libraries = sorted((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this package of onnxruntime has no shared library")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(libraries[0])
    (tmp_path / "greedy.cc").write_text(_program("cpp"))
    options = ("-std=c++17", "-I", _headers(), "greedy.cc", "-L", tmp_path, "-lonnxruntime", "-o", "greedy")
    _run("g++", *options, cwd=tmp_path)
    printed = _run("./greedy", folder, COUNT, *PROMPT, cwd=tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert _tokens(printed) == expected


@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node.js and npm")
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_javascript(package: str, folder: Path, expected: list[int], tmp_path: Path) -> None:
    """Without the op library, which JavaScript cannot load."""
    # Its install script fetches GPU libraries from elsewhere.
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", f"{package}@1.30.0"]
    if subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0:
        pytest.skip(f"npm could not install {package}")
    program = _program("js").replace("onnxruntime-node", package)
    if package == "onnxruntime-web":  # it fetches addresses, or takes what was read
        opening = "session = await ort.InferenceSession.create(`${folder}/model.onnx`);"
        assert opening in program
        program = program.replace(
            opening,
            "read = (name) => fs.readFileSync(`${folder}/${name}`);\n"
            "const session = await ort.InferenceSession.create(read('model.onnx'), "
            "{ externalData: [{ path: 'model.onnx.data', data: read('model.onnx.data') }] });",
        )
        program = "import fs from 'node:fs';\n" + program
    (tmp_path / "greedy.mjs").write_text(program)
    assert _tokens(_run("node", "greedy.mjs", folder, COUNT, *PROMPT, cwd=tmp_path)) == expected
