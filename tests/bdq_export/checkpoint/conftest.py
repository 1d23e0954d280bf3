"""A tiny model as a folder on disk, and a check of how a bad one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bdq_export.checkpoint import open_checkpoint
from bdq_export.errors import BdqError


def _byte_tokenizer() -> Tokenizer:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.fixture
def model_dir(tmp_path: Path, tiny_model: Callable[..., Any]) -> Callable[..., Path]:
    """Write a whole model folder: `model_dir(family="llama", dtype=None, **config changes) -> Path`."""
    from safetensors.torch import save_file

    from bdq_export.checkpoint import to_checkpoint_names

    def make(family: str = "llama", dtype: Any = None, **changes: Any) -> Path:
        tiny = tiny_model(family, **changes)
        directory = tmp_path / "model"
        directory.mkdir()
        stored = to_checkpoint_names(tiny.architecture, tiny.weights)
        save_file(
            {name: value.to(dtype or value.dtype) for name, value in stored.items()}, directory / "model.safetensors"
        )
        (directory / "config.json").write_text(json.dumps(tiny.config))
        _byte_tokenizer().save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text("{}")
        return directory

    return make


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Change keys of a JSON file: `edit_json(path, key=value)`; None removes a key."""

    def edit(path: Path, **changes: Any) -> None:
        merged = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))

    return edit


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Check a refusal: `refused(path, kind, *words)`: exact kind of error, one line, words in it, nothing written."""

    def check(path: Path | str, kind: type[BdqError], *words: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(kind) as caught:
            open_checkpoint(path).weights()
        message = str(caught.value)
        assert caught.type is kind
        assert "\n" not in message
        assert 20 < len(message) < 500
        for word in words:
            assert word in message
        assert sorted(tmp_path.rglob("*")) == before
        return message

    return check
