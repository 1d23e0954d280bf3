"""A tied embedding is looked up in the panels of lm_head: one table, the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import Level, LowerToGatherBlockQuantizedPass, LowerToLowBitLinearPass, LowerToPanelGatherPass, verify
from bdq_passes import annotations as note
from bdq_passes.functions import attach_functions
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec

SPECS = [QuantSpec(bits, PerChannel()) for bits in (2, 4, 8)] + [QuantSpec(4, PerChannel(), grid="odd")]


def _embeddings(model: ir.Model) -> ir.Model:
    """The model with the embeddings as another output."""
    node = next(node for node in model.graph if node.name == "ab")
    value = node.inputs[0]
    assert value is not None
    value.name = "embeddings"
    model.graph.outputs.append(value)
    return model


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"w{s.bits}-{s.grid}")
def test_the_same_rows_from_one_table(quantized: Any, run: Any, ids: Any, spec: QuantSpec) -> None:
    # 48 columns fill three quarters of a chunk, 40 rows two and a half panels
    made = quantized(spec)
    model = made.model
    LowerToLowBitLinearPass(everything=True)(model)
    assert LowerToPanelGatherPass()(model).modified
    verify(model, Level.LOWERED)
    tables = [
        value for value in model.graph.initializers.values() if value.const_value.nbytes > 40 * 48 * spec.bits // 8
    ]
    assert [value.name for value in tables if "embed" in str(value.name)] == ["model.embed_tokens.weight_panels"]
    attach_functions(_embeddings(model))
    expected = made.weights["model.embed_tokens.weight"].dequantize()[ids]
    for optimize in (False, True):
        np.testing.assert_array_equal(run(model, {"input_ids": ids}, optimize=optimize)[1], expected)


@pytest.mark.parametrize("spec", [QuantSpec(4, PerBlock(32)), QuantSpec(3, PerChannel())])
def test_other_tables_are_left_alone(quantized: Any, spec: QuantSpec) -> None:
    model = quantized(spec).model
    LowerToLowBitLinearPass(everything=True)(model)
    assert not LowerToPanelGatherPass()(model).modified


def test_an_untied_table_is_left_alone(quantized: Any) -> None:
    model = quantized(QuantSpec(8, PerChannel()), tied=False).model
    LowerToLowBitLinearPass(everything=True)(model)
    assert not LowerToPanelGatherPass()(model).modified
    LowerToGatherBlockQuantizedPass()(model)
    verify(model, Level.LOWERED)


def test_a_second_run_changes_nothing(quantized: Any) -> None:
    model = quantized(QuantSpec(8, PerChannel())).model
    LowerToLowBitLinearPass(everything=True)(model)
    LowerToPanelGatherPass()(model)
    assert not LowerToPanelGatherPass()(model).modified
    assert [node.name for node in note.with_role(model, note.EMBEDDING)] == ["model.embed_tokens"]
