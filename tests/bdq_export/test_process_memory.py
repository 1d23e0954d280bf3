"""Garbage collections within an export leave out what was there before it, and only within it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bdq_export import calibrate, export
from bdq_export.process_memory import collecting_new_objects_only


class Cycle:
    """Unreachable, and alive until a collection sees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_frozen() -> Iterator[None]:
    """As in a process that never called `gc.freeze`, which the test session did."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_only_new_objects_are_collected_within() -> None:
    before = Cycle()
    old = weakref.ref(before)
    with collecting_new_objects_only():
        del before
        new = weakref.ref(Cycle())
        gc.collect()
        assert old() is not None
        assert new() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


@pytest.mark.usefixtures("nothing_frozen")
def test_collections_are_as_before_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="stop"), collecting_new_objects_only():
        raise RuntimeError("stop")
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("nothing_frozen")
def test_what_a_caller_froze_stays_frozen() -> None:
    gc.freeze()
    count = gc.get_freeze_count()
    with collecting_new_objects_only():
        assert gc.get_freeze_count() == count
    assert gc.get_freeze_count() == count
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_frozen")
def test_an_export_collects_new_objects_only(
    model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = []

    def stop(*_arguments: Any) -> None:
        frozen.append(gc.get_freeze_count())
        raise RuntimeError("stop")

    monkeypatch.setattr(calibrate, "calibrate", stop)
    with pytest.raises(RuntimeError, match="stop"):
        export(model_dir("llama"), tmp_path / "out", scheme="w4a16", quiet=True)
    assert frozen[0] > 0
    assert gc.get_freeze_count() == 0
