"""Files that cannot be opened are named, in one line, with what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from bdq_runtime.model import LanguageModel
from bdq_runtime.session import create_session, numpy_type


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.onnx does not exist"):
        LanguageModel(tmp_path / "nowhere.onnx")
    (tmp_path / "other.onnx").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=r"has no model\.onnx \(found other\.onnx\)"):
        LanguageModel(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"hello world\n" * 20, "not an ONNX model"), (b"\x00" * 100, "not an ONNX model")],
)
def test_not_an_onnx_file(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        create_session(file)


def test_data_file_is_missing(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = copy_of(tiny_decoder(), tmp_path)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(FileNotFoundError, match=r"data file of .*model\.onnx is missing.*keep the two together"):
        create_session(folder / "model.onnx")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_data_file_is_truncated(
    tiny_decoder: Callable[..., Path], tmp_path: Path, kept: float, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(tiny_decoder(), tmp_path)
    data = folder / "model.onnx.data"
    data.write_bytes(data.read_bytes()[: int(data.stat().st_size * kept)])
    with pytest.raises(ValueError, match=r"data file of .* is truncated") as error:
        create_session(folder / "model.onnx")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_graph_without_a_cache(tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="not a decoder with a KV cache: it has no input_ids"):
        LanguageModel(tmp_path)


def test_options_are_checked(tiny_decoder: Callable[..., Path]) -> None:
    file = tiny_decoder() / "model.onnx"
    with pytest.raises(ValueError, match="threads is 0"):
        create_session(file, threads=0)
    with pytest.raises(ValueError, match="execution provider NoneSuch is not available"):
        create_session(file, providers=["NoneSuch"])
    with pytest.raises(ValueError, match=r"tensor\(string\) is not supported"):
        numpy_type("tensor(string)")
