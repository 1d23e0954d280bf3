"""Where the op library is found, and what a session does without it."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from bdq_export.commands.runtime_errors import invalid_input
from bdq_export.errors import MissingDependencyError
from bdq_runtime import library
from bdq_runtime.library import (
    LibraryError,
    LibraryInfo,
    LibraryMissingError,
    LibraryNotLoadableError,
    LibraryTooOldError,
)
from bdq_runtime.opset import VERSION
from bdq_runtime.opsets import opset_version
from bdq_runtime.session import create_session


def save_model(path: Path, version: int | None = 1, body_adds: float = 100.0) -> Path:
    """`y = Hadamard(x)`, whose function body adds `body_adds` instead, so that one sees which of the two ran."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4]) for n in ("x", "y"))
    if version is None:
        graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return path
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("bdq", version)]
    body = [
        helper.make_node("Constant", [], ["c"], value_float=body_adds),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    function = helper.make_function("bdq", "Hadamard", ["x"], ["y"], body, domains[:1], ["size"])
    node = helper.make_node("Hadamard", ["x"], ["y"], domain="bdq", size=4)
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10, functions=[function]), path)
    return path


def result(session: ort.InferenceSession) -> Any:
    return session.run(None, {"x": np.array([[1, 0, 0, 0]], np.float32)})[0].tolist()


FUNCTION, KERNEL = [[101, 100, 100, 100]], [[0.5, 0.5, 0.5, 0.5]]


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("BDQ_LIBRARY", raising=False)
    monkeypatch.setattr(library, "_NAME", "libnone.so")
    library.warn_slow.cache_clear()
    yield
    library.warn_slow.cache_clear()


def built() -> bool:
    try:
        return library.library_path().is_file()
    except LibraryMissingError:
        return False


needs_library = pytest.mark.skipif(not built(), reason="the op library was not built")


@needs_library
def test_the_library_is_used_where_it_is(tmp_path: Path) -> None:
    file = save_model(tmp_path / "m.onnx")
    assert result(create_session(file)) == KERNEL
    assert result(create_session(file, use_library=True)) == KERNEL
    assert result(create_session(file, use_library=False)) == FUNCTION


@pytest.mark.usefixtures("no_library")
def test_without_the_library_functions_run_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save_model(tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert result(create_session(file)) == FUNCTION
        create_session(save_model(tmp_path / "stock.onnx", None))
    assert [record.message for record in caplog.records] == [caplog.records[0].message]
    assert "libnone.so is missing" in caplog.text
    with pytest.raises(LibraryMissingError, match=r"libnone\.so is missing; reinstall"):
        create_session(file, use_library=True)
    create_session(tmp_path / "stock.onnx", use_library=True)  # needs none


@needs_library
def test_a_model_of_a_newer_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = save_model(tmp_path / "m.onnx", version=VERSION + 1)
    library.warn_slow.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert result(create_session(file)) == FUNCTION
    assert f"version {VERSION} of the bdq operators, the model uses version {VERSION + 1}" in caplog.text
    with pytest.raises(LibraryTooOldError, match="upgrade bdq-export"):
        create_session(file, use_library=True)


@needs_library
def test_a_library_of_a_newer_version_leaves_older_models_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "library_info", lambda: LibraryInfo(9, (), {}))
    assert result(create_session(save_model(tmp_path / "m.onnx"))) == KERNEL


def test_a_file_that_is_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.so").write_bytes(b"\x7fELF nothing")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "bad.so")
    file = save_model(tmp_path / "m.onnx")
    with caplog.at_level(logging.WARNING):
        assert result(create_session(file)) == FUNCTION
    assert "bad.so does not load" in caplog.text
    with pytest.raises(LibraryNotLoadableError, match=r"bad\.so does not load"):
        create_session(file, use_library=True)
    with pytest.raises(LibraryError, match=r"bad\.so cannot be used"):
        library.register(ort.SessionOptions())


def test_another_build_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDQ_LIBRARY", str(tmp_path / "mine.so"))
    with pytest.raises(LibraryMissingError, match=r"mine\.so, which BDQ_LIBRARY names, does not exist"):
        library.library_path()
    (tmp_path / "mine.so").touch()
    assert library.library_path() == tmp_path / "mine.so"


@pytest.mark.usefixtures("no_library")
def test_the_command_line_says_that_a_dependency_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"libnone\.so is missing") as error, invalid_input():
        create_session(save_model(tmp_path / "m.onnx"), use_library=True)
    assert error.value.exit_code == 7
    with pytest.raises(RuntimeError, match=r"^other$"), invalid_input():
        raise RuntimeError("other")


def test_opset_version(tmp_path: Path, tiny_decoder: Callable[..., Path]) -> None:
    for version in (1, 300, 2**40):
        assert opset_version(save_model(tmp_path / "m.onnx", version), "bdq") == version
    assert opset_version(tmp_path / "m.onnx", "") == 21
    assert opset_version(save_model(tmp_path / "n.onnx", None), "bdq") is None
    assert opset_version(tiny_decoder() / "model.onnx", "com.microsoft") == 1


@given(st.binary(max_size=300))
def test_any_bytes_are_read_without_an_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.onnx"
    file.write_bytes(data)
    opset_version(file, "bdq")


def test_a_length_beyond_the_file_ends_it(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"\x3a" + b"\xff" * 9 + b"\x01" + struct.pack("<Q", 1))
    assert opset_version(tmp_path / "m.onnx", "bdq") is None
