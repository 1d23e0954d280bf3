"""File, class, name and test of a pass agree."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from bdq_passes import PASSES, GraphPass, Level

_VERBS = ("annotate", "attach", "insert", "keep", "lower", "merge", "refuse", "split", "store", "strip")


def _words(text: str) -> str:
    """Letters only, in lower case: `MatMulNBits` and `matmul-nbits` are the same word."""
    return re.sub("[^a-z0-9]", "", text.lower())


@pytest.mark.parametrize(("name", "item"), PASSES.items(), ids=PASSES)
def test_names_agree(name: str, item: type[GraphPass]) -> None:
    assert item.name == name
    assert item.__module__ == f"bdq_passes.{name.replace('-', '_')}"
    assert _words(item.__name__) == _words(name) + "pass"
    assert name.split("-")[0] in _VERBS
    assert (Path(__file__).parent / f"test_{name.replace('-', '_')}.py").is_file()


@pytest.mark.parametrize("item", PASSES.values(), ids=PASSES)
def test_passes_are_values(item: type[GraphPass]) -> None:
    assert dataclasses.is_dataclass(item)
    assert item.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert isinstance(item.takes, Level)
    assert isinstance(item.gives, Level)
    assert "Requires" in (item.__doc__ or "")
    assert "ensures" in (item.__doc__ or "")
