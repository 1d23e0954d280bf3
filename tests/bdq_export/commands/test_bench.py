"""`bdq bench`: figures of the model that was given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bdq_export.commands.bench import bench, render
from bdq_export.errors import InvalidInputError, UsageError


def test_bench(tiny_decoder: Callable[..., Path]) -> None:
    found = bench(tiny_decoder(), prompt_len=16, new_tokens=4, threads=1)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["model"].endswith("model.onnx")
    assert (data["prompt_len"], data["new_tokens"], data["threads"]) == (16, 4, 1)
    assert data["prefill_tokens_per_second"] == pytest.approx(16 / data["time_to_first_token_seconds"])
    assert data["decode_tokens_per_second"] > 1
    assert data["shares_cache"] is True
    assert render(found) is not None


def test_errors(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompt-len is 0"):
        bench(tiny_decoder(), prompt_len=0)
    with pytest.raises(InvalidInputError, match="the model's context is 256"):
        bench(tiny_decoder(), prompt_len=300)
    with pytest.raises(InvalidInputError, match="does not exist"):
        bench(tmp_path / "none.onnx")
