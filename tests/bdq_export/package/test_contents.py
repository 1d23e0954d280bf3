"""The files beside the model: copied, cleaned, described."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bdq_export.checkpoint import Checkpoint
from bdq_export.errors import InvalidInputError
from bdq_export.options import ExportOptions
from bdq_export.package.contents import write_documents, write_side_files
from bdq_export.package.layout import resolve_layout
from bdq_export.package.metadata import ModelMetadata, read_metadata
from bdq_export.package.model_card import model_card
from bdq_export.package.side_files import clean_tokenizer_config, side_files
from bdq_export.package.writer import staged_output
from bdq_export.progress import StageCost
from bdq_export.report.report import ExportReport
from bdq_export.verify import Verification

INPUTS = ["input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value"]
OPTIONS = ExportOptions()


def report(top1: float = 0.9, seconds: float = 1.5) -> ExportReport:
    return ExportReport(
        version="0.1.0",
        model="Tiny <Llama>",
        family="llama",
        scheme="w4a16",
        transform="bdq",
        executed_precision="float32",
        source_hash="ab" * 32,
        options=dataclasses.asdict(OPTIONS),
        parameters=1000,
        weight_bytes=650,
        source_bytes=4000,
        stages=(StageCost("gptq", seconds, 10),),
        verification=Verification(0.01, top1, 10.0, 10.5, 99, 0.7),
        warnings=("mind the gap",),
    )


def written(
    tmp_path: Path, checkpoint: Checkpoint, made: ExportReport, model: Any, out: str = "out.onnx"
) -> dict[str, bytes]:
    (tmp_path / "made").mkdir(exist_ok=True)
    with staged_output(resolve_layout(tmp_path / "made" / out), force=True) as staged:
        staged.save_model(model)
        write_side_files(staged, checkpoint, INPUTS)
        write_documents(staged, checkpoint, OPTIONS, made, INPUTS)
        return {path.name: path.read_bytes() for path in staged.publish()}


@pytest.fixture
def model(toy_weights: Any, toy_model: Any) -> Any:
    return toy_model(*toy_weights(0))


def test_all_files_of_the_design_are_there(tmp_path: Path, toy_checkpoint: Checkpoint, model: Any) -> None:
    files = written(tmp_path, toy_checkpoint, report(), model)
    assert set(files) == {
        "out.onnx", "out.onnx.data", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json",
        "generation_config.json", "genai_config.json", "bdq_config.json", "bdq_report.json", "report.html",
        "README.md", "SHA256SUMS",
    }  # fmt: skip


def test_bytes_are_copied_and_paths_are_not(tmp_path: Path, toy_checkpoint: Checkpoint, model: Any) -> None:
    files = written(tmp_path, toy_checkpoint, report(), model)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert files[name] == (toy_checkpoint.directory / name).read_bytes()
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 256
    config = json.loads(files["config.json"])
    assert "_name_or_path" not in config
    assert config["hidden_size"] == toy_checkpoint.dimensions.hidden_size
    for name, content in files.items():
        assert b"/home/someone" not in content, name
        assert str(tmp_path).encode() not in content, name
    assert json.loads(files["genai_config.json"])["model"]["eos_token_id"] == [2, 5]


def test_only_report_files_differ_between_runs(tmp_path: Path, toy_checkpoint: Checkpoint, model: Any) -> None:
    first = written(tmp_path, toy_checkpoint, report(seconds=1.0), model)
    second = written(tmp_path, toy_checkpoint, report(seconds=2.0), model)
    assert {name for name in first if first[name] != second[name]} == {"bdq_report.json", "report.html"}


def test_failed_verification_is_marked(tmp_path: Path, toy_checkpoint: Checkpoint, model: Any) -> None:
    files = written(tmp_path, toy_checkpoint, report(top1=0.3), model)
    assert b"30.0% of 99 tokens" in files["UNVERIFIED"]
    assert json.loads(files["bdq_report.json"])["verified"] is False
    assert b"**Not verified**" in files["README.md"]
    files = written(tmp_path, toy_checkpoint, report(), model)
    assert "UNVERIFIED" not in files
    assert json.loads(files["bdq_report.json"])["verified"] is True
    assert not (tmp_path / "made" / "UNVERIFIED").exists()


def test_model_card(tmp_path: Path, toy_checkpoint: Checkpoint, model: Any) -> None:
    hub = dataclasses.replace(toy_checkpoint, config={**toy_checkpoint.config, "_name_or_path": "org/name"})
    card = written(tmp_path, hub, report(), model)["README.md"].decode()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "license": "apache-2.0",
        "base_model": "org/name",
        "base_model_relation": "quantized",
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "bdq-export", "w4a16"],
    }
    for text in ("# Tiny <Llama>, w4a16, ONNX", "5.20 bits per weight", "10.500", "bdq run out.onnx", "mind the gap"):
        assert text in card
    assert "\n\n\n" not in card


def test_card_names_the_inputs() -> None:
    plain = model_card(report(), "out.onnx", INPUTS, {}, {}).decode()
    assert "inputs `input_ids`, `attention_mask` and `past_key_values.N.key|value`" in plain
    assert "logits_to_keep" not in plain
    counting = model_card(report(), "model.onnx", [*INPUTS, "logits_to_keep"], {}, {}).decode()
    assert "inputs `input_ids`, `attention_mask` and `past_key_values.N.key|value`" in counting
    assert "optional input `logits_to_keep`" in counting
    assert "bdq run . --chat" in counting


def test_card_without_what_is_not_known(tmp_path: Path, toy_checkpoint: Checkpoint, model: Any) -> None:
    (toy_checkpoint.directory / "README.md").unlink()
    card = written(tmp_path, toy_checkpoint, dataclasses.replace(report(), verification=None), model)["README.md"]
    front = yaml.safe_load(card.decode().split("---\n")[1])
    assert "license" not in front
    assert "base_model" not in front
    assert b"Verification" not in card


def test_tokenizer_config_is_left_alone_when_it_is_right() -> None:
    raw = b'{ "model_max_length":128 }'
    assert clean_tokenizer_config(raw, 128) is raw
    assert json.loads(clean_tokenizer_config(raw, 64))["model_max_length"] == 64
    assert json.loads(clean_tokenizer_config(b'{"name_or_path": "C:\\\\models\\\\x", "a": 1}', 64)) == {"a": 1}
    assert b"org/name" in clean_tokenizer_config(b'{"name_or_path": "org/name"}', 64)
    with pytest.raises(InvalidInputError, match="not valid JSON"):
        clean_tokenizer_config(b"\xff{", 64)


def test_missing_file_is_one_clear_line(toy_checkpoint: Checkpoint) -> None:
    (toy_checkpoint.directory / "tokenizer.json").unlink()
    with pytest.raises(InvalidInputError, match=r"tokenizer\.json is missing"):
        side_files(toy_checkpoint, "out.onnx", INPUTS)


@pytest.mark.parametrize("version", [None, 1])
def test_metadata_round_trips(model: Any, version: int | None) -> None:
    metadata = ModelMetadata("0.1.0", "w4a16", 3, "ab" * 32, "float32", "bdq", "llama", operators_version=version)
    metadata.write(model)
    fields = {k: str(v) for k, v in dataclasses.asdict(metadata).items() if v is not None}
    assert read_metadata(model.metadata_props) == fields
    assert ("operators_version" in fields) == (version is not None)
    assert model.producer_name == "bdq-export"
    assert read_metadata({"other.key": "1"}) == {}
