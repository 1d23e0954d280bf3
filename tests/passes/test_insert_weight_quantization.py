"""The QUANTIZED graph computes exactly what the quantized weights say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import AnnotateLinearsPass, InsertWeightQuantizationPass
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec

SPECS = [
    QuantSpec(bits, granularity, symmetric)
    for bits in (2, 3, 4, 8)
    for granularity in (PerBlock(16), PerBlock(32), PerChannel())
    for symmetric in (True, False)
]


def _insert(tiny: Any, weights: Any, expected: int = 3) -> ir.Model:
    AnnotateLinearsPass(expected=3)(tiny.model)
    assert InsertWeightQuantizationPass(weights, expected=expected)(tiny.model).modified
    return tiny.model


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("optimize", [False, True])
def test_equals_dequantized_weights(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any, spec: QuantSpec, optimize: bool
) -> None:
    graph = tiny(bias=True)
    weights = quantize_all(graph, spec)
    expected = graph.reference(ids, {name: weight.dequantize() for name, weight in weights.items()})
    found = run(_insert(graph, weights), {"input_ids": ids}, optimize=optimize)
    assert relative_error(found, expected) < 1e-6


def test_a_wrong_scale_is_seen(tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)))
    expected = graph.reference(ids, {name: weight.dequantize() for name, weight in weights.items()})
    wrong = weights["b.weight"]
    weights["b.weight"] = replace(wrong, scales=wrong.scales * np.float32(1.01))
    found = run(_insert(graph, weights), {"input_ids": ids})
    assert relative_error(found, expected) > 1e-3


def test_nodes_in_text(tiny: Any, quantize_all: Any) -> None:
    graph = tiny(tied=False)
    model = _insert(graph, quantize_all(graph, QuantSpec(4, PerBlock(16))))
    found = [(node.op_type, [str(value.name) for value in node.inputs if value is not None]) for node in model.graph]
    assert found[:4] == [
        ("DequantizeLinear", [f"model.embed_tokens.weight_{part}" for part in ("codes", "scale", "zero_point")]),
        ("Gather", ["model.embed_tokens.weight_dequantized", "input_ids"]),
        ("DequantizeLinear", ["ab.weight_codes", "ab.weight_scale", "ab.weight_zero_point"]),
        ("MatMul", ["model.embed_tokens_out", "ab.weight_dequantized"]),
    ]
    assert not [name for name in model.graph.initializers if name.endswith(".weight")]


def test_codes_are_views(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(8, PerBlock(16)))
    model = _insert(graph, weights)
    for name, key in (("c.weight", "c.weight"), ("lm_head.weight", "model.embed_tokens.weight")):
        codes = model.graph.initializers[f"{name}_codes"].const_value
        assert codes is not None
        assert np.shares_memory(codes.numpy(), weights[key].codes)


def test_absent_weights_are_kept_and_said_so(
    tiny: Any, quantize_all: Any, run: Any, ids: Any, relative_error: Any
) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)), c=None)
    expected = graph.reference(ids, {name: weight.dequantize() for name, weight in weights.items()})
    model = _insert(graph, weights, expected=2)
    kept = [node.name for node in model.graph if note.is_kept(node)]
    assert kept == ["c"]
    assert relative_error(run(model, {"input_ids": ids}), expected) < 1e-6


def test_tied_head_with_its_own_weight_is_untied(tiny: Any, quantize_all: Any, random_weight: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)))
    weights["lm_head.weight"] = random_weight(40, 48, QuantSpec(8, PerBlock(16)))
    model = _insert(graph, weights)
    head = next(node for node in model.graph if node.name == "lm_head")
    assert note.tied(head) is None
    assert note.spec(head) == QuantSpec(8, PerBlock(16))


def test_second_run_is_a_precondition_error(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)))
    model = _insert(graph, weights)
    with pytest.raises(ir.passes.PreconditionError):
        InsertWeightQuantizationPass(weights, expected=3)(model)


def test_unused_weight_is_an_error(tiny: Any, quantize_all: Any, random_weight: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)))
    weights["d.weight"] = random_weight(4, 16, QuantSpec(4, PerBlock(16)))
    with pytest.raises(ValueError, match=r"1 quantized weights have no node in the graph, the first is d\.weight"):
        _insert(graph, weights)


def test_mixed_parts_are_an_error(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    with pytest.raises(ValueError, match=r"node ab: its parts .* run split-mixed-linears first"):
        _insert(graph, quantize_all(graph, QuantSpec(4, PerBlock(16)), b=QuantSpec(8, PerBlock(16))))


def test_another_count_is_an_error(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    with pytest.raises(ValueError, match="3 linears were quantized, expected 2"):
        _insert(graph, quantize_all(graph, QuantSpec(4, PerBlock(16))), expected=2)


def test_wrong_shape_is_an_error(tiny: Any, quantize_all: Any, random_weight: Any) -> None:
    graph = tiny()
    weights = quantize_all(graph, QuantSpec(4, PerBlock(16)))
    weights["c.weight"] = random_weight(48, 32, QuantSpec(4, PerBlock(16)))
    with pytest.raises(ValueError, match=r"node c: the quantized weight is \(32, 48\), expected"):
        _insert(graph, weights)
