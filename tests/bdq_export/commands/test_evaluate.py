"""`bdq eval`: its figures are those of the runtime, and every bad input is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bdq_export.commands import evaluate as module
from bdq_export.commands.evaluate import evaluate, render
from bdq_export.errors import InvalidInputError, UsageError
from bdq_runtime.model import LanguageModel
from bdq_runtime.perplexity import measure_perplexity, windows_of
from bdq_runtime.tokenizer import TextTokenizer

TEXT = "The thin thread of a long text, which goes on and on: naïve, 😀. " * 8


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_perplexity_and_tasks(tiny_decoder: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    folder = tiny_decoder()
    rows = [{"context": "a b", "choices": [" c", " d"], "gold": 1}] * 3
    task = tmp_path / "choose.jsonl"
    task.write_text("\n".join(map(json.dumps, rows)))
    found = evaluate(folder / "model.onnx", text, seq_len=64, max_windows=3, tasks=[task], threads=1)

    windows = windows_of(TextTokenizer(folder).encode(TEXT), 64, 3)
    assert found.perplexity == measure_perplexity(LanguageModel(folder, threads=1), windows)
    assert (found.begins_windows, found.reference) == (False, None)
    (score,) = found.tasks
    assert (score.name, score.rows) == ("choose", 3)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["perplexity"]["windows"] == 3
    assert data["tasks"][0]["accuracy"] in (0.0, 1.0)
    assert render(found) is not None


def test_windows_begin_as_the_tokenizer_says(tiny_decoder: Callable[..., Path], text: Path) -> None:
    folder = tiny_decoder(begin=True)
    found = evaluate(folder, text, seq_len=64, max_windows=2, threads=1)
    windows = windows_of(TextTokenizer(folder).encode(TEXT), 64, 2, beginning=[259])
    assert found.begins_windows
    assert found.perplexity == measure_perplexity(LanguageModel(folder, threads=1), windows)


def test_reference_is_compared(tiny_decoder: Callable[..., Path], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = LanguageModel(tiny_decoder(), threads=1)

    def reference(window: Any) -> Any:
        other.reset()
        return other.append(window, all_logits=True) * np.float32(0.5)

    monkeypatch.setattr(module, "_load_reference", lambda path, stack: reference)
    found = evaluate(tiny_decoder(), text, seq_len=64, max_windows=2, reference="float", threads=1)
    assert found.perplexity is not None
    assert found.perplexity.top1_agreement == 1.0, "halved logits keep the order"
    assert found.perplexity.kl_divergence is not None
    assert found.perplexity.kl_divergence > 0.1
    assert found.reference == "float"
    assert render(found) is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"text\x00text", "is binary"),
        (b"text \xff\xfe text", r"is not UTF-8 \(byte 5\)"),
        (b"short", "5 tokens, less than one window of 64"),
    ],
)
def test_bad_texts(tiny_decoder: Callable[..., Path], text: Path, content: bytes, message: str) -> None:
    text.write_bytes(content)
    with pytest.raises(InvalidInputError, match=message):
        evaluate(tiny_decoder(), text, seq_len=64, threads=1)


def test_missing_files(tiny_decoder: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"text file .*none\.txt does not exist"):
        evaluate(tiny_decoder(), tmp_path / "none.txt")
    with pytest.raises(InvalidInputError, match=r"task file .*none\.jsonl does not exist"):
        evaluate(tiny_decoder(), tasks=[tmp_path / "none.jsonl"])
    with pytest.raises(InvalidInputError, match=r"model .*nowhere does not exist"):
        evaluate(tmp_path / "nowhere", text)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "target": " b"}\n{')
    with pytest.raises(InvalidInputError, match=r"bad\.jsonl, line 2 is not valid JSON"):
        evaluate(tiny_decoder(), tasks=[bad])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "nothing to evaluate"),
        ({"text": None, "tasks": ["t.jsonl"], "reference": "dir"}, "--reference is compared on a text"),
        ({"text": None, "tasks": ["t.jsonl"], "seq_len": 1024}, "--seq-len cuts a text into windows"),
        ({"text": None, "tasks": ["t.jsonl"], "max_windows": 3}, "--max-windows cuts a text into windows"),
        ({}, "--seq-len is 1024, the model's context is 256"),
        ({"seq_len": 1}, "--seq-len is 1"),
        ({"seq_len": 1000}, "the model's context is 256"),
        ({"max_windows": 0}, "--max-windows is 0"),
        ({"threads": 0}, "--threads is 0"),
    ],
)
def test_options_that_cannot_be_meant(
    tiny_decoder: Callable[..., Path], text: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(tiny_decoder(), **{"text": text, **options})


def test_reference_without_torch_says_what_to_install(tiny_decoder: Callable[..., Path], text: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bdq_export.commands.evaluate import evaluate\n"
        f"evaluate({str(tiny_decoder())!r}, {str(text)!r}, seq_len=64, reference='x', threads=1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert "MissingDependencyError" in done.stderr
    assert 'pip install "bdq-export[export]"' in done.stderr
