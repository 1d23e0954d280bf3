"""Gate and up become one linear, and the MLP computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import AnnotateLinearsPass, InsertWeightQuantizationPass, LowerToMatMulNBitsPass, MergeGateUpPass
from bdq_passes import annotations as note
from bdq_runtime.packing import PerBlock, QuantSpec

FOUR, EIGHT = QuantSpec(4, PerBlock(16)), QuantSpec(8, PerBlock(16))
ALIKE = {"mlp.gate.weight": FOUR, "mlp.up.weight": FOUR, "mlp.down.weight": FOUR}


def _merge(model: ir.Model, specs: dict[str, QuantSpec], expected: int = 1) -> bool:
    AnnotateLinearsPass(expected=3)(model)
    return MergeGateUpPass(specs, expected)(model).modified


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("up_first", [False, True])
def test_same_function_with_one_linear_less(
    mlp: Any, run: Any, hidden: Any, activation: str, bias: bool, up_first: bool
) -> None:
    expected = run(mlp(activation, bias=bias, up_first=up_first), {"x": hidden})
    model = mlp(activation, bias=bias, up_first=up_first)
    assert _merge(model, ALIKE)
    np.testing.assert_allclose(run(model, {"x": hidden}), expected, rtol=1e-6, atol=1e-6)
    linears = list(note.with_role(model, note.LINEAR))
    assert [(node.name, note.parts(node)) for node in linears] == [
        ("mlp.gate_up_proj", ("mlp.gate", "mlp.up")),
        ("mlp.down", ("mlp.down",)),
    ]
    assert {"mlp.gate.weight", "mlp.up.weight", "mlp.gate.bias"}.isdisjoint(model.graph.initializers)


def test_swapped_halves_would_be_seen(mlp: Any, run: Any, hidden: Any) -> None:
    model = mlp("silu")
    expected = run(model, {"x": hidden})
    assert np.abs(run(mlp("silu", swapped=True), {"x": hidden}) - expected).max() > 0.01


@pytest.mark.parametrize("specs", [{}, {"mlp.gate.weight": FOUR}, {"mlp.gate.weight": FOUR, "mlp.up.weight": EIGHT}])
def test_other_pairs_are_left_alone(mlp: Any, specs: dict[str, QuantSpec]) -> None:
    assert not _merge(mlp("silu"), specs, expected=0)


def test_a_pair_that_is_not_found_is_an_error(mlp: Any) -> None:
    with pytest.raises(ValueError, match="1 gated MLPs have one linear for gate and up, expected 2"):
        _merge(mlp("silu"), ALIKE, expected=2)


def test_a_second_run_changes_nothing(mlp: Any) -> None:
    model = mlp("silu")
    _merge(model, ALIKE)
    assert not MergeGateUpPass(ALIKE, 1)(model).modified


def test_the_merged_linear_is_quantized_and_lowered(mlp: Any, run: Any, hidden: Any, random_weight: Any) -> None:
    model = mlp("silu", bias=True)
    plain = mlp("silu", bias=True)
    shapes = {node.name: node.inputs[1].shape for node in plain.graph if node.op_type == "MatMul"}
    weights = {
        f"{name}.weight": random_weight(shape[1], shape[0], FOUR, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    _merge(model, ALIKE)
    AnnotateLinearsPass(expected=3)(plain)
    for each, count in ((model, 2), (plain, 3)):
        InsertWeightQuantizationPass(weights, expected=count)(each)
        LowerToMatMulNBitsPass(accuracy_level=0)(each)
    found, expected = run(model, {"x": hidden}), run(plain, {"x": hidden})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
