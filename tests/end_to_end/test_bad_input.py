"""Every kind of bad input, on the command line: its exit code, one clear line, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

Refused = Callable[..., str]

PLAIN = ("--transform", "none", "--weights", "rtn", "--min-top1", "0")
USAGE, UNSUPPORTED, INVALID, RESOURCES = 2, 3, 4, 5


def _empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def _edit(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, **changes}))

    return spoil


def _remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


def _cut(size: int) -> Callable[[Path], None]:
    return lambda model: os.truncate(model / "model.safetensors", size)


def _cut_end(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1000)


def _header_length(length: int) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        with (model / "model.safetensors").open("r+b") as file:
            file.write(struct.pack("<Q", length))

    return spoil


def _header_offsets(model: Path) -> None:
    """A tensor that claims bytes far behind the end of the file."""
    data = (model / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    next(entry for name, entry in header.items() if name != "__metadata__")["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _shards(*names: str) -> Callable[[Path], None]:
    """Two shards and their index, in which the second is called `names[1]`, which is not there."""

    def spoil(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(model / "model.safetensors")
        places = {tensor: names["layers.1." in tensor] for tensor in weights}
        save_file({tensor: weights[tensor] for tensor in weights if places[tensor] == names[0]}, model / names[0])
        (model / "model.safetensors").unlink()
        (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return spoil


def _pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")


def _set_weight(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def spoil(model: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = load_file(model / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        save_file({**weights, name: change(weights[name].clone())}, model / "model.safetensors")

    return spoil


def _with(value: float) -> Callable[[Any], Any]:
    def change(weight: Any) -> Any:
        weight[3, 4] = value
        return weight

    return change


MODELS: dict[str, tuple[int, str, Callable[[Path], None]]] = {
    "missing": (INVALID, "does not exist", shutil.rmtree),
    "empty": (INVALID, "is empty", _empty),
    "no config": (INVALID, "has no config.json", _remove("config.json")),
    "config is no JSON": (INVALID, "config.json", lambda model: (model / "config.json").write_text("{") and None),
    "no weights": (INVALID, "model.safetensors", _remove("model.safetensors")),
    "no header": (INVALID, "model.safetensors", _cut(0)),
    "truncated length": (INVALID, "model.safetensors", _cut(5)),
    "truncated header": (INVALID, "model.safetensors", _cut(100)),
    "truncated data": (INVALID, "model.safetensors", _cut_end),
    "lying length": (INVALID, "model.safetensors", _header_length(1 << 60)),
    "lying offsets": (INVALID, "model.safetensors", _header_offsets),
    "missing shard": (INVALID, "b.safetensors is missing", _shards("a.safetensors", "b.safetensors")),
    "index outside": (INVALID, "plain file name", _shards("a.safetensors", "../a.safetensors")),
    "pickle": (INVALID, "pickle", _pickle),
    "NaN": (INVALID, "NaN", _set_weight(_with(float("nan")))),
    "infinity": (INVALID, "infin", _set_weight(_with(float("-inf")))),
    "shape": (INVALID, "up_proj", _set_weight(lambda weight: weight[:-1].clone())),
    "tokenizer missing": (INVALID, "tokenizer.json is needed", _remove("tokenizer.json")),
    "encoder-decoder": (UNSUPPORTED, "encoder-decoder", _edit("config.json", is_encoder_decoder=True)),
    "vision": (UNSUPPORTED, "multimodal", _edit("config.json", vision_config={"hidden_size": 8})),
    "unknown family": (
        UNSUPPORTED,
        "qwen3",  # one of the supported
        _edit("config.json", model_type="mamba", architectures=["MambaForCausalLM"]),
    ),
    "remote code": (UNSUPPORTED, "auto_map", _edit("config.json", auto_map={"AutoModel": "modeling.Model"})),
}


@pytest.mark.parametrize("kind", MODELS)
def test_bad_models(kind: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    code, words, spoil = MODELS[kind]
    spoil(model)
    assert words in refused(code, "export", model, tmp_path / "out", *PLAIN)


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        ("--no-such-flag", ["--no-such-flag"]),
        ("w4x", ["--scheme", "w4x"]),
        ("4bit", ["--scheme", "4bit"]),
        ("scheme", ["--scheme", ""]),
        ("w99a16", ["--scheme", "w99a16"]),
        ("w3a16", ["--scheme", "w3a16", "--ops", "matmulnbits"]),
        ("transform", ["--transform", "magic"]),
        ("weights", ["--weights", "awq"]),
        ("33", ["--block-size", "33"]),
        ("block size", ["--block-size", "-1"]),
        ("seed", ["--seed", "many"]),
        ("seed", ["--seed", "-1"]),
        ("seed", ["--seed", "99999999999999999999"]),
        ("calib-samples", ["--calib-samples", "1"]),
        ("calib-seq-len", ["--calib-seq-len", "0"]),
        ("--calib-seq-len is 257, the model's context is 256", ["--calib-seq-len", "257"]),
        ("min-top1", ["--min-top1", "1.5"]),
        ("min-top1", ["--min-top1", "nan"]),
        ("w8a8", ["--ops", "qdq"]),
        ("MODULE=BITS", ["--keep", "lm_head"]),
        ("MODULE=BITS", ["--keep", "=8"]),
        ("MODULE=BITS", ["--keep", "lm_head=5"]),
        ("MODULE=BITS", ["--keep", "lm_head=eight"]),
        ("lm_haed", ["--keep", "lm_haed=8"]),
        ("target-bits is 1.0", ["--target-bits", "1"]),
        ("target-bits is nan", ["--target-bits", "nan"]),
        ("leaves them float", ["--scheme", "w16a4", "--target-bits", "4"]),
        ("expected one of dynamic, static", ["--scheme", "w4a16kv8", "--kv-scales", "none"]),
        ("leaves it float", ["--scheme", "w4a16", "--kv-scales", "static"]),
        ("has 4 or 8 bits", ["--scheme", "w4a16kv3", "--kv-scales", "static"]),
        ("linears of 2, 4, 8 bits, with 7 linears", ["--target-bits", "2", "--keep", "*.layers.0.*=8"]),
        ("--keep fixes every linear", ["--target-bits", "8", "--keep", "*_proj=8"]),
        ("--dump", ["--dump", "dump", "--dry-run"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(words: str, flags: list[str], sources: Path, tmp_path: Path, refused: Refused) -> None:
    assert words in refused(USAGE, "export", sources / "model", tmp_path / "out", *flags)


@pytest.mark.parametrize("arguments", [["export"], ["export", "model"], ["nonsense"], ["run", "model"]])
def test_missing_arguments(arguments: list[str], refused: Refused) -> None:
    assert "--help" in refused(USAGE, *arguments)


@pytest.mark.parametrize("level", ["loud", "10"])
def test_a_log_level_that_is_none(level: str, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDQ_LOG_LEVEL", level)
    assert f"BDQ_LOG_LEVEL is '{level}', expected one of debug, info" in refused(USAGE, "inspect", "model")


def test_no_arguments_are_a_wish_for_help(bdq: Callable[..., Any], bdq_export_command: Callable[..., Any]) -> None:
    for command, word in ((bdq, "inspect"), (bdq_export_command, "--scheme")):
        outcome = command()
        assert (outcome.code, outcome.err) == (USAGE, "")
        assert word in outcome.out


@pytest.mark.parametrize(
    ("words", "content"),
    [
        ("No such file", None),
        ("is empty", b""),
        ("is empty", b" \n\t\n"),
        ("binary", b"text\0text" * 100),
        ("not UTF-8", b"text \xff\xfe" * 100),
        ("72 tokens", b"too short" * 8),
    ],
)
def test_bad_calibration_text(
    words: str, content: bytes | None, sources: Path, tmp_path: Path, refused: Refused
) -> None:
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    flags = ["--calib", tmp_path / "text.txt", "--calib-seq-len", "64"]
    assert words in refused(INVALID, "export", sources / "model", tmp_path / "out", *flags)


def test_a_folder_is_no_calibration_text(sources: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "texts").mkdir()
    message = refused(INVALID, "export", sources / "model", tmp_path / "out", "--calib", tmp_path / "texts")
    assert "calibration file" in message


@pytest.mark.parametrize(
    ("code", "words", "content"),
    [
        (INVALID, "no configuration file", None),
        (INVALID, "did you mean 'scheme'", '{"sceme": "w4a16"}'),
        (INVALID, "not valid JSON", '{"scheme": '),
        (INVALID, "JSON object", "[]"),
        (INVALID, "expected int", '{"seed": "0"}'),
        (INVALID, "given twice", '{"seed": 0, "seed": 1}'),
        (USAGE, "w4x", '{"scheme": "w4x"}'),
    ],
)
def test_bad_configuration(
    code: int, words: str, content: str | None, sources: Path, tmp_path: Path, refused: Refused
) -> None:
    config = tmp_path / "bdq_config.json"
    if content is not None:
        config.write_text(content)
    assert words in refused(code, "export", sources / "model", tmp_path / "out", "--config", config)


def test_an_existing_output_needs_force(sources: Path, exported: Path, refused: Refused) -> None:
    assert "--force" in refused(USAGE, "export", sources / "model", exported)
    assert "--force" in refused(USAGE, "export", sources / "model", exported / "model.onnx")


def test_a_file_of_the_user_is_not_replaced(sources: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "README.md").write_text("mine")
    message = refused(INVALID, "export", sources / "model", tmp_path / "out.onnx", "--force")
    assert "not written by bdq-export" in message


@pytest.mark.parametrize("out", ["no/such/folder.onnx", "no/such", "model", "model/out.onnx", "a file/out.onnx"])
def test_bad_places_for_the_output(out: str, model: Path, tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "a file").write_text("")
    refused(INVALID, "export", model, tmp_path / out)


def test_read_only_output(
    sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):  # root may write anywhere
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode, **_: Path(path) != folder and real(path, mode))
    for out in (folder / "out", folder / "out.onnx"):
        assert "read-only" in refused(INVALID, "export", sources / "model", out)
    assert list(folder.iterdir()) == []


def test_a_file_system_that_turns_read_only(
    sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tempfile.mkdtemp

    def refuse(*args: Any, **kwargs: Any) -> str:
        if kwargs.get("prefix") == ".bdq-export-":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return str(real(*args, **kwargs))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    assert "cannot be written to" in refused(INVALID, "export", sources / "model", tmp_path / "out", *PLAIN)


def test_too_little_disk_is_seen_before_the_work(
    sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    message = refused(RESOURCES, "export", sources / "model", tmp_path / "out")
    assert "0.0 GB are free" in message


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    """The system itself refuses to write more than `size` bytes into a file."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [20_000, 60_000])
def test_a_disk_that_fills_up_while_the_model_is_written(
    size: int, sources: Path, tmp_path: Path, refused: Refused
) -> None:
    with _largest_file(size):
        message = refused(RESOURCES, "export", sources / "model", tmp_path / "out", *PLAIN)
    assert "is full" in message


def _full(*args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "call", ["tempfile.mkdtemp", "pathlib.Path.write_text", "pathlib.Path.write_bytes", "os.fsync"]
)
def test_a_full_disk_at_any_write(
    call: str, sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, _full)
    assert "full" in refused(RESOURCES, "export", sources / "model", tmp_path / "out", *PLAIN)


def test_a_dump_folder_on_a_full_disk(
    sources: Path, tmp_path: Path, bdq: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.write_text

    def write(path: Path, *args: Any, **kwargs: Any) -> int:
        return _full() if path.parent.name == "dump" else real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write)
    outcome = bdq("export", sources / "model", tmp_path / "out", *PLAIN, "--dump", tmp_path / "dump")
    assert (outcome.code, len(outcome.errors)) == (RESOURCES, 1)
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_seen_before_the_work(
    sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdq_export.preflight.available_memory", lambda: 10**8)
    message = refused(RESOURCES, "export", sources / "model", tmp_path / "out")
    assert "0.1 GB are available" in message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out(
    error: Exception, sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise error

    monkeypatch.setattr("bdq_export.float_model.load_float_model", fail)
    assert "out of memory" in refused(RESOURCES, "export", sources / "model", tmp_path / "out")


def test_a_defect_of_the_program_is_one_line_too(
    sources: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bdq_export.float_model.load_float_model", lambda *_: 1 / 0)
    message = refused(1, "export", sources / "model", tmp_path / "out")
    assert "ZeroDivisionError" in message
    assert "BDQ_LOG_LEVEL=debug" in message


def test_below_the_threshold_files_are_kept_and_marked(sources: Path, tmp_path: Path, bdq: Callable[..., Any]) -> None:
    flags = [*PLAIN[:-1], "1", "--scheme", "w2a16", "--json"]
    outcome = bdq("export", sources / "model", tmp_path / "out", *flags)
    assert (outcome.code, outcome.out, len(outcome.errors)) == (6, "", 1)
    assert "UNVERIFIED" in outcome.errors[0]
    assert (tmp_path / "out" / "UNVERIFIED").is_file()
    assert [path.name for path in tmp_path.glob(".bdq-export-*")] == []
