"""The op library goes beside a model of bdq operators, and is never named where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bdq_export.checkpoint import Checkpoint
from bdq_export.package.contents import write_side_files
from bdq_export.package.layout import resolve_layout
from bdq_export.package.op_library import OpLibrary, find_op_library
from bdq_export.package.writer import staged_output
from bdq_runtime import library
from bdq_runtime.library import LibraryInfo, LibraryMissingError

INPUTS = ["input_ids", "attention_mask"]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of version 3."""
    path = tmp_path / "libbdq_ops.so"
    path.write_bytes(b"library")
    monkeypatch.setattr(library, "library_path", lambda: path)
    monkeypatch.setattr(library, "library_info", lambda: LibraryInfo(3, ("scalar",), {}))
    return path


def test_stock_models_need_none(installed: Path) -> None:
    assert find_op_library((), 0) is None


@pytest.mark.parametrize("version", [1, 3])
def test_the_installed_one_is_taken(installed: Path, version: int) -> None:
    found = find_op_library(("LowBitLinear",), version)
    assert found == OpLibrary(("LowBitLinear",), version, installed)
    assert found.name == "libbdq_ops.so"


def test_one_that_is_too_old_is_not(installed: Path) -> None:
    found = find_op_library(("LowBitLinear",), 4)
    assert found is not None
    assert (found.path, found.name) == (None, None)
    assert "version 3" in found.reason


def test_a_missing_one_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> LibraryInfo:
        raise LibraryMissingError("the op library is missing")

    monkeypatch.setattr(library, "library_info", missing)
    found = find_op_library(("LowBitLinear",), 1)
    assert found is not None
    assert (found.path, found.reason) == (None, "the op library is missing")


@pytest.mark.parametrize("there", [False, True])
def test_genai_names_it_only_where_it_lies(
    there: bool, installed: Path, tmp_path: Path, toy_checkpoint: Checkpoint, toy_model: Any, toy_weights: Any
) -> None:
    with staged_output(resolve_layout(tmp_path / "out")) as staged:
        staged.save_model(toy_model(*toy_weights(0)))
        write_side_files(staged, toy_checkpoint, INPUTS, installed if there else None)
        files = {path.name: path.read_bytes() for path in staged.publish()}
    session = json.loads(files["genai_config.json"])["model"]["decoder"]["session_options"]
    assert session.get("custom_ops_library") == ("libbdq_ops.so" if there else None)
    assert ("libbdq_ops.so" in files) == there
    assert (b"libbdq_ops.so" in files["SHA256SUMS"]) == there
