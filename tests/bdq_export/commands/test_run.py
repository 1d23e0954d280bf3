"""`bdq run`: the streamed text is the generated one, and every bad input is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from bdq_export.commands.run import render, run, stream
from bdq_export.errors import InvalidInputError, UsageError
from bdq_runtime.generate import generate_tokens
from bdq_runtime.model import LanguageModel
from bdq_runtime.tokenizer import TextTokenizer


def test_text_is_that_of_the_tokens(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    tokenizer = TextTokenizer(folder)
    ids = list(generate_tokens(LanguageModel(folder, threads=1), tokenizer.encode("hello"), 20))
    result = run(folder / "model.onnx", "hello", max_new_tokens=20, threads=1)
    assert result.text == tokenizer.decode(ids)
    assert (result.prompt_tokens, result.new_tokens) == (5, len(ids))
    assert result.finish_reason == ("length" if len(ids) == 20 else "stop")
    assert "".join(stream(folder, "hello", max_new_tokens=20, threads=1)) == result.text
    assert result.to_dict()["new_tokens"] == len(ids)
    assert render(result) is not None


def test_finish_reason_is_stop_at_the_end_token(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_decoder(), tmp_path / "copy"))
    ids = list(generate_tokens(LanguageModel(folder, threads=1), TextTokenizer(folder).encode("hello"), 20, stop=()))
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ids[6]}}}')
    result = run(folder, "hello", max_new_tokens=20, threads=1)
    assert (result.finish_reason, result.new_tokens) == ("stop", ids.index(ids[6]))


def test_chat_wraps_the_prompt(tiny_decoder: Callable[..., Path]) -> None:
    folder = tiny_decoder()
    found = run(folder, "hi", max_new_tokens=8, chat=True, threads=1)
    assert found.prompt_tokens == len(TextTokenizer(folder).encode("<user>hi>"))
    assert found.text == run(folder, "<user>hi>", max_new_tokens=8, threads=1).text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens is 0"),
        ({"temperature": -0.5}, r"--temperature is -0\.5"),
        ({"threads": 0}, "--threads is 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"prompt": ""}, "--prompt is empty"),
    ],
)
def test_options_out_of_range(tiny_decoder: Callable[..., Path], options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stream(tiny_decoder(), **{"prompt": "x", **options})  # type: ignore[arg-type]


def broken(folder: Path, name: str) -> str:
    """Break a copy of a folder; the message it must give."""
    if name == "model":
        (folder / "model.onnx").unlink()
        return r"has no model\.onnx"
    if name == "data":
        (folder / "model.onnx.data").unlink()
        return "data file of .* is missing"
    if name == "tokenizer":
        (folder / "tokenizer.json").unlink()
        return r"has no tokenizer\.json"
    if name == "config":
        (folder / "generation_config.json").write_text("{")
        return r"generation_config\.json is not valid JSON"
    (folder / "chat_template.jinja").unlink()
    return "no chat template"


@pytest.mark.parametrize("name", ["model", "data", "tokenizer", "config", "template"])
def test_broken_folders(tiny_decoder: Callable[..., Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(tiny_decoder(), tmp_path / "copy"))
    message = broken(folder, name)
    with pytest.raises(InvalidInputError, match=message) as error:
        run(folder, "hi", max_new_tokens=2, chat=True, threads=1)
    assert "\n" not in str(error.value)


def test_tokenizer_of_another_model(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_decoder(), tmp_path / "copy"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["th"] = 900
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InvalidInputError, match="token 900 is not one of the model's 264"):
        run(folder, "th", max_new_tokens=2, threads=1)
