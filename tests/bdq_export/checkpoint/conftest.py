"""Ways to spoil a model folder, and a check of how a bad one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdq_export.checkpoint import open_checkpoint
from bdq_export.errors import BdqError


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
