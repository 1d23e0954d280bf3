"""Every linear is marked, or the count says so."""

from __future__ import annotations

from typing import Any

import pytest

from bdq_passes import AnnotateLinearsPass, Level, verify
from bdq_passes import annotations as note


def test_roles_and_count(tiny: Any) -> None:
    model = tiny().model
    assert AnnotateLinearsPass(expected=3)(model).modified
    assert [node.name for node in note.with_role(model, note.LINEAR)] == ["ab", "c", "lm_head"]
    assert [node.name for node in note.with_role(model, note.EMBEDDING)] == ["model.embed_tokens"]
    assert note.linear_count(model) == 3
    verify(model, Level.ANNOTATED)


def test_second_run_changes_nothing(tiny: Any) -> None:
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    assert not AnnotateLinearsPass(expected=3)(model).modified


@pytest.mark.parametrize("expected", [0, 2, 4])
def test_another_count_names_both(tiny: Any, expected: int) -> None:
    with pytest.raises(ValueError, match=f"3 linears found in the graph, expected {expected}"):
        AnnotateLinearsPass(expected=expected)(tiny().model)


def test_linear_without_parts_is_an_error(tiny: Any) -> None:
    model = tiny().model
    next(node for node in model.graph if node.name == "c").metadata_props.clear()
    with pytest.raises(ValueError, match=r"node c: a MatMul with a weight but without bdq\.parts"):
        AnnotateLinearsPass(expected=2)(model)
