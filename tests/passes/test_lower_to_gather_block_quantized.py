"""GatherBlockQuantized gives exactly the rows of the QUANTIZED table, and shares it with a tied lm_head."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from bdq_passes import (
    AnnotateLinearsPass,
    InsertWeightQuantizationPass,
    Level,
    LowerToGatherBlockQuantizedPass,
    LowerToMatMulNBitsPass,
    verify,
)
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec

BLOCKS = (PerBlock(16), PerBlock(32), PerBlock(64), PerChannel())
SPECS = [QuantSpec(bits, block, symmetric) for bits in (2, 4, 8) for block in BLOCKS for symmetric in (True, False)]
FLOAT = QuantSpec(4, PerBlock(16))


def _quantized(tiny: Any, weights: Any) -> ir.Model:
    AnnotateLinearsPass(expected=3)(tiny.model)
    InsertWeightQuantizationPass(weights, expected=3)(tiny.model)
    return tiny.model


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding_first", [True, False])
def test_lowered_equals_quantized(
    tiny: Any,
    quantize_all: Any,
    run: Any,
    ids: Any,
    relative_error: Any,
    spec: QuantSpec,
    tied: bool,
    embedding_first: bool,
) -> None:
    # The linears but lm_head are of 4 bits: computed in float32, so that the embedding's error would show.
    graph = tiny(tied=tied, bias=True)
    weights = quantize_all(graph, spec, a=FLOAT, b=FLOAT, c=FLOAT, lm_head=FLOAT)
    model = _quantized(graph, weights)
    expected = run(model, {"input_ids": ids})
    passes: list[Any] = [LowerToGatherBlockQuantizedPass(), LowerToMatMulNBitsPass(accuracy_level=0)]
    for item in passes if embedding_first else passes[::-1]:
        assert item(model).modified
    verify(model, Level.LOWERED)
    exact = not (tied and spec.bits == 8)
    for optimize in (False, True):
        error = relative_error(run(model, {"input_ids": ids}, optimize=optimize), expected)
        assert error < (1e-5 if exact else 2e-2)


def test_rows_alone_are_exact(tiny: Any, quantize_all: Any, run: Any, ids: Any) -> None:
    for spec in SPECS:
        graph = tiny()
        weights = quantize_all(graph, spec)
        model = _quantized(graph, weights)
        LowerToGatherBlockQuantizedPass()(model)
        rows = next(node for node in model.graph if node.name == "ab").inputs[0]
        assert rows is not None
        model.graph.outputs[:] = [rows]
        found = run(model, {"input_ids": ids})
        expected = weights["model.embed_tokens.weight"].dequantize()[ids]
        assert abs(found - expected).max() < 1e-6 * abs(expected).max(), spec


def test_tied_head_shares_one_initializer(tiny: Any, quantize_all: Any) -> None:
    graph = tiny(vocabulary=77)
    model = _quantized(graph, quantize_all(graph, QuantSpec(8, PerBlock(16))))
    LowerToMatMulNBitsPass()(model)
    LowerToGatherBlockQuantizedPass()(model)
    nodes = {node.name: node for node in model.graph}
    assert nodes["model.embed_tokens"].inputs[0] is nodes["lm_head"].inputs[1]
    large = [name for name, value in model.graph.initializers.items() if tuple(value.shape or ())[:1] == (77,)]
    assert large == ["model.embed_tokens.weight_packed", "model.embed_tokens.weight_packed_scale"]


def test_untied_head_has_its_own(tiny: Any, quantize_all: Any) -> None:
    graph = tiny(tied=False)
    model = _quantized(graph, quantize_all(graph, QuantSpec(8, PerBlock(16))))
    LowerToMatMulNBitsPass()(model)
    LowerToGatherBlockQuantizedPass()(model)
    assert {"model.embed_tokens.weight_packed", "lm_head.weight_packed"} <= set(model.graph.initializers)


def test_three_bits_are_an_error(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(3, PerBlock(16))))
    with pytest.raises(ValueError, match="3 bits, but GatherBlockQuantized has 2, 4, 8"):
        LowerToGatherBlockQuantizedPass()(model)


def test_second_run_changes_nothing(tiny: Any, quantize_all: Any) -> None:
    graph = tiny()
    model = _quantized(graph, quantize_all(graph, QuantSpec(4, PerBlock(16))))
    LowerToGatherBlockQuantizedPass()(model)
    assert not LowerToGatherBlockQuantizedPass()(model).modified
