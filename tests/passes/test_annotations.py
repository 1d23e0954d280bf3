"""Annotations read back as they were written, also after a trip through the file."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec


@pytest.mark.parametrize("granularity", [PerBlock(32), PerBlock(128), PerChannel()], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_spec_round_trips(bits: int, symmetric: bool, granularity: PerBlock | PerChannel) -> None:
    spec = QuantSpec(bits, granularity, symmetric)
    node = ir.node("MatMul", [])
    assert note.spec(node) is None
    note.set_spec(node, spec)
    assert note.spec(node) == spec


def test_parts_keep_their_order() -> None:
    node = ir.node("MatMul", [])
    assert note.parts(node) == ()
    note.set_parts(node, ("q", "k", "v"))
    assert note.parts(node) == ("q", "k", "v")


def test_tied_can_be_cleared() -> None:
    node = ir.node("MatMul", [])
    note.set_tied(node, "embedding.weight")
    assert note.tied(node) == "embedding.weight"
    note.clear_tied(node)
    assert note.tied(node) is None
