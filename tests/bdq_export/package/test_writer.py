"""An export is there whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bdq_export.errors import InvalidInputError, ResourceError, UsageError
from bdq_export.package.layout import SUMS, Layout, check_output, resolve_layout
from bdq_export.package.writer import StagedOutput, staged_output

Export = Callable[..., tuple[Path, ...]]


@pytest.fixture
def export(toy_weights: Any, toy_model: Any) -> Export:
    def run(out: Path, force: bool = False, seed: int = 0, **side: bytes) -> tuple[Path, ...]:
        with staged_output(check_output(out, force), force) as staged:
            staged.save_model(toy_model(*toy_weights(seed)))
            staged.write("config.json", b"{}")
            staged.write("bdq_report.json", os.urandom(8))
            for name, content in side.items():
                staged.write(name, content)
            return staged.publish()

    return run


def write_then(layout: Layout, model: ir.Model, action: Callable[[StagedOutput], object]) -> None:
    """Stage a model, then do something that must not leave anything behind."""
    with staged_output(layout, force=True) as staged:
        staged.save_model(model)
        action(staged)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def runs(path: Path) -> bool:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {
        "input_ids": np.zeros((1, 3), np.int64),
        "attention_mask": np.ones((1, 3), np.int64),
        "past_key_values.0.key": np.zeros((1, 1, 0, 64), np.float32),
        "past_key_values.0.value": np.zeros((1, 1, 0, 64), np.float32),
    }
    return session.run(["logits"], feed)[0].shape == (1, 3, 320)


@pytest.mark.parametrize(
    ("out", "onnx_name"), [("out.onnx", "out.onnx"), ("folder", "model.onnx"), ("F.ONNX", "F.ONNX")]
)
def test_everything_is_there_and_runs(tmp_path: Path, export: Export, out: str, onnx_name: str) -> None:
    paths = export(tmp_path / out)
    folder = paths[0].parent
    assert paths[0].name == onnx_name
    assert sorted(p.name for p in paths) == sorted(tree(folder))
    assert {onnx_name, onnx_name + ".data", "config.json", SUMS, "bdq_report.json"} == set(tree(folder))
    assert runs(paths[0])
    onnx.checker.check_model(str(paths[0]))
    assert all(path.stat().st_mode & 0o777 == 0o666 & ~_umask() for path in paths)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_big_initializers_are_external_and_aligned(tmp_path: Path, export: Export) -> None:
    model = onnx.load(str(export(tmp_path / "out.onnx")[0]), load_external_data=False)
    for tensor in model.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        assert bool(external) == (tensor.name != "axis")
        if tensor.data_type == onnx.TensorProto.FLOAT:
            assert int(external["offset"]) % 4 == 0, "an odd number of bytes before it must not shift a float tensor"


def test_same_model_gives_the_same_bytes(tmp_path: Path, export: Export) -> None:
    first, second = tree(export(tmp_path / "a")[0].parent), tree(export(tmp_path / "b")[0].parent)
    assert first.keys() == second.keys()
    assert first.pop("bdq_report.json") != second.pop("bdq_report.json")
    assert first == second


def test_sums_check_with_sha256sum(tmp_path: Path, export: Export) -> None:
    folder = export(tmp_path / "out")[0].parent
    command = ["sha256sum", "--check", "--strict", SUMS]
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode == 0
    listed = {line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()}
    assert listed == {"model.onnx", "model.onnx.data", "config.json"}
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\0")
    assert subprocess.run(command, cwd=folder, check=False, capture_output=True).returncode != 0


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize("out", ["out.onnx", "folder"])
def test_any_exception_leaves_nothing(
    tmp_path: Path, toy_weights: Any, toy_model: Any, error: BaseException, out: str
) -> None:
    (tmp_path / "mine.txt").write_text("keep")

    def fail(staged: StagedOutput) -> None:
        assert staged.onnx_path.exists()
        raise error

    with pytest.raises(type(error)):
        write_then(resolve_layout(tmp_path / out), toy_model(*toy_weights(0)), fail)
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_sigterm_leaves_nothing(tmp_path: Path, toy_weights: Any, toy_model: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    layout, model = resolve_layout(tmp_path / "out"), toy_model(*toy_weights(0))
    with pytest.raises(SystemExit) as stop:
        write_then(layout, model, lambda staged: os.kill(os.getpid(), signal.SIGTERM))
    assert stop.value.code == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "write_bytes", "save"])
def test_full_disk_is_a_resource_error_and_leaves_nothing(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    target = {"fsync": "os.fsync", "write_bytes": "pathlib.Path.write_bytes", "save": "onnx.save"}[call]
    monkeypatch.setattr(target, full)
    with pytest.raises(ResourceError, match="is full") as error:
        export(tmp_path / "out")
    assert error.value.exit_code == 5
    assert os.listdir(tmp_path) == []


def test_full_disk_while_the_weights_are_written(tmp_path: Path, export: Export) -> None:
    """A real limit on the size of a file, in the system's own words."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(ResourceError, match="is full"):
            export(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_read_only_error_while_writing(tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(InvalidInputError, match="cannot be written to") as error:
        export(tmp_path / "out")
    assert error.value.exit_code == 4


def test_existing_output_needs_force(tmp_path: Path, export: Export) -> None:
    out = tmp_path / "out.onnx"
    export(out, **{"chat_template.jinja": b"old", "UNVERIFIED": b"old"})
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="--force"):
        export(out, seed=1)
    assert tree(tmp_path) == before
    (tmp_path / "mine.txt").write_text("keep")
    export(out, force=True, seed=1)
    after = tree(tmp_path)
    assert after["out.onnx.data"] != before["out.onnx.data"]
    assert after["mine.txt"] == b"keep"
    assert "chat_template.jinja" not in after, "a template of the old export would be silently wrong"
    assert "UNVERIFIED" not in after
    assert runs(out)


def test_force_keeps_another_model_in_the_same_folder(tmp_path: Path, export: Export) -> None:
    export(tmp_path / "a.onnx")
    with pytest.raises(UsageError, match="already holds an export"):
        export(tmp_path / "b.onnx")
    export(tmp_path / "b.onnx", force=True, seed=1)
    assert runs(tmp_path / "a.onnx")
    assert runs(tmp_path / "b.onnx")


@pytest.mark.parametrize("force", [False, True])
def test_a_file_that_no_export_wrote_is_never_replaced(tmp_path: Path, export: Export, force: bool) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(InvalidInputError, match="not written by bdq-export"):
        check_output(tmp_path / "out.onnx", force)
    (tmp_path / "README.md").unlink()
    (tmp_path / "other.json").write_text("mine")
    with pytest.raises(InvalidInputError, match="not written by bdq-export"):
        export(tmp_path / "out.onnx", force, **{"other.json": b"ours"})
    assert tree(tmp_path) == {"other.json": b"mine"}


def test_failure_while_renaming_restores_what_was_there(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    export(out)
    before = tree(tmp_path)
    replace, calls = Path.replace, []

    def fail_late(self: Path, target: Path) -> Path:
        calls.append(target)
        if target == out and self.parent.name.startswith(".bdq-export-"):
            raise OSError(errno.EIO, "broken")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_late)
    with pytest.raises(OSError, match="broken"):
        export(out, force=True, seed=1)
    assert len(calls) > 5
    assert tree(tmp_path) == before


def test_model_is_away_while_its_data_is_replaced(
    tmp_path: Path, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.onnx"
    export(out)
    replace, seen = Path.replace, []

    def watch(self: Path, target: Path) -> Path:
        seen.append((target.name, out.exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watch)
    export(out, force=True, seed=1)
    assert seen[0] == ("out.onnx", True)
    assert seen[-1] == ("out.onnx", False)
    assert not any(there for _, there in seen[1:])


def test_missing_folder_and_wrong_kinds(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="does not exist; create it first"):
        check_output(tmp_path / "none" / "out.onnx", False)
    with pytest.raises(InvalidInputError, match="does not exist; create it first"):
        check_output(tmp_path / "none" / "folder", False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidInputError, match="is a file"):
        check_output(tmp_path / "file", True)
    (tmp_path / "dir.onnx").mkdir()
    with pytest.raises(InvalidInputError, match="not a plain file"):
        check_output(tmp_path / "dir.onnx", True)


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InvalidInputError, match="is read-only"):
        check_output(tmp_path / "out.onnx", False)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("name", ["out.onnx", "out.onnx.data", "config.json"])
def test_symlinks_are_refused(tmp_path: Path, force: bool, name: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(InvalidInputError, match="symbolic link"):
        check_output(folder / "out.onnx", force)
    assert victim.read_text() == "mine"


def test_dangling_symlink_as_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InvalidInputError, match="symbolic link to nothing"):
        check_output(tmp_path / "out", True)
    assert not (tmp_path / "nowhere").exists()


def test_link_that_appears_late_is_refused(tmp_path: Path, toy_weights: Any, toy_model: Any) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()

    def link_then_publish(staged: StagedOutput) -> None:
        (folder / "out.onnx.data").symlink_to(victim)
        staged.publish()

    layout, model = check_output(folder / "out.onnx", True), toy_model(*toy_weights(0))
    with pytest.raises(InvalidInputError, match="symbolic link"):
        write_then(layout, model, link_then_publish)
    assert victim.read_text() == "mine"


def test_hard_link_keeps_its_other_name(tmp_path: Path, export: Export) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    os.link(other, folder / "out.onnx.data")
    export(folder / "out.onnx", force=True)
    assert other.read_text() == "mine"
    assert (folder / "out.onnx.data").stat().st_nlink == 1


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_side_file_names_are_plain(tmp_path: Path, name: str) -> None:
    with staged_output(resolve_layout(tmp_path / "out")) as staged, pytest.raises(ValueError, match="plain file name"):
        staged.write(name, b"")
