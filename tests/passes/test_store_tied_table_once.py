"""A tied float table is stored once and computes what it did."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import AnnotateLinearsPass, InsertWeightQuantizationPass, Level, StoreTiedTableOncePass, verify
from bdq_runtime.packing import PerBlock, QuantSpec


def _prepared(graph: Any, weights: dict[str, Any]) -> ir.Model:
    AnnotateLinearsPass(expected=3)(graph.model)
    quantized = sum(name.split(".")[0] in ("a", "c") for name in weights)
    InsertWeightQuantizationPass(weights=weights, expected=quantized)(graph.model)
    model: ir.Model = graph.model
    return model


@pytest.mark.parametrize("optimize", [False, True])
def test_the_table_is_stored_once(tiny: Any, run: Any, ids: Any, optimize: bool) -> None:
    graph = tiny()
    model = _prepared(graph, {})
    before = run(model, {"input_ids": ids}, optimize=optimize)
    assert StoreTiedTableOncePass()(model).modified
    verify(model, Level.LOWERED)
    sizes = [value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None]
    assert sorted(sizes)[-1] == graph.weights["model.embed_tokens.weight"].size
    assert "lm_head.weight" not in model.graph.initializers
    np.testing.assert_allclose(run(model, {"input_ids": ids}, optimize=optimize), before, rtol=0, atol=1e-5)
    assert not StoreTiedTableOncePass()(model).modified


def test_untied_and_quantized_heads_stay(tiny: Any, quantize_all: Any) -> None:
    assert not StoreTiedTableOncePass()(_prepared(tiny(tied=False), {})).modified
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(8, PerBlock(16), symmetric=True))
    AnnotateLinearsPass(expected=3)(graph.model)
    InsertWeightQuantizationPass(weights=weights, expected=3)(graph.model)
    assert not StoreTiedTableOncePass()(graph.model).modified


def test_another_weight_is_refused(tiny: Any) -> None:
    model = _prepared(tiny(), {})
    model.graph.initializers["lm_head.weight"].shape = ir.Shape([48, 39])
    with pytest.raises(ValueError, match="is no transpose of"):
        StoreTiedTableOncePass()(model)
