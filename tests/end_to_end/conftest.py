"""The command line in this process, and one tiny model and its export to try it on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from bdq_export.cli import main, main_export

QUICK = ("--calib-samples", "4", "--calib-seq-len", "32", "--min-top1", "0")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that say what went wrong."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that this test alone uses for temporary files."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def bdq(capfd: pytest.CaptureFixture[str], scratch: Path) -> Callable[..., Outcome]:
    """Run `bdq ARGUMENTS`, or with `entry` another entry point; no temporary file may stay."""

    def run(*arguments: object, entry: Callable[..., None] = main) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        assert list(scratch.iterdir()) == []
        assert isinstance(stop.value.code, int)
        return Outcome(stop.value.code, printed.out, printed.err)

    return run


@pytest.fixture
def bdq_export_command(bdq: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Run `bdq-export ARGUMENTS`."""
    return lambda *arguments: bdq(*arguments, entry=main_export)


@pytest.fixture
def refused(bdq: Callable[..., Outcome], tmp_path: Path) -> Callable[..., str]:
    """Run a command that must end with `code` and one line, and change nothing; returns the line."""

    def run(code: int, *arguments: object) -> str:
        before = tree(tmp_path)
        outcome = bdq(*arguments)
        assert len(outcome.errors) == 1, outcome.err
        assert (outcome.code, outcome.out) == (code, ""), outcome.err
        assert "Traceback" not in outcome.err
        assert tree(tmp_path) == before
        return outcome.errors[0]

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file (with its content) and folder in `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if not path.is_socket()
    }


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A folder with `model`, of two layers, and `exported`, made of it with every stage there is."""
    folder = tmp_path_factory.mktemp("sources")
    write_model(folder / "model", "llama3", num_hidden_layers=2)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(folder / "model"), str(folder / "exported"), *QUICK])
    assert stop.value.code == 0
    return folder


@pytest.fixture
def model(sources: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return Path(shutil.copytree(sources / "model", tmp_path / "model"))


@pytest.fixture
def exported(sources: Path, tmp_path: Path) -> Path:
    """A copy of its export."""
    return Path(shutil.copytree(sources / "exported", tmp_path / "exported"))
