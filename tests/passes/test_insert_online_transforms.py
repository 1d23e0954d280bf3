"""Linears transform their inputs, and weights that expect it give the same function."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import InsertOnlineTransformsPass
from bdq_passes import annotations as note
from bdq_passes.functions import attach_functions
from bdq_runtime.reference import hadamard
from bdq_runtime.specs import Kronecker, OnlineTransform

DIAGONAL = np.linspace(0.5, 2, 48).astype(np.float32)


def _rotate(weight: Any, size: int, diagonal: Any) -> Any:
    """The weight `[N, K]` that computes the same on `hadamard(x) * diagonal`."""
    matrix = hadamard(np.eye(size, dtype=np.float32), size)
    rotated = np.concatenate([block @ matrix for block in np.split(weight, weight.shape[1] // size, axis=1)], axis=1)
    return (rotated / diagonal).astype(np.float32)


def _interleave(weight: Any, runs: int) -> Any:
    """Columns of `[N, K]` in the order of channels that take turns: the first of each run, the second of each, ..."""
    columns = np.arange(weight.shape[1]).reshape(runs, -1)
    return weight[:, np.concatenate(list(columns.T))]


def _model(quantized: Any, transform: OnlineTransform | None = None) -> ir.Model:
    model: ir.Model = quantized(kept=True).model
    if transform is not None:
        for node in note.with_role(model, note.LINEAR):
            if node.name in ("ab", "lm_head"):
                value = node.inputs[1]
                assert value is not None
                assert value.const_value is not None
                diagonal = np.float32(1) if transform.diagonal is None else transform.diagonal
                weight = _interleave(value.const_value.numpy().T, transform.interleave)
                weight = _rotate(weight, transform.hadamard_size, diagonal)
                value.const_value = ir.Tensor(np.ascontiguousarray(weight.T), name=value.name)
        InsertOnlineTransformsPass({"ab": transform, "lm_head": transform})(model)
        attach_functions(model)
    return model


@pytest.mark.parametrize("runs", [1, 3, 4])
@pytest.mark.parametrize("diagonal", [None, DIAGONAL])
def test_the_same_function(quantized: Any, run: Any, ids: Any, relative_error: Any, diagonal: Any, runs: int) -> None:
    expected = run(_model(quantized), {"input_ids": ids})
    transformed = _model(quantized, OnlineTransform(16, diagonal, interleave=runs))
    assert relative_error(run(transformed, {"input_ids": ids}), expected) < 1e-5
    nodes = [node for node in transformed.graph if node.op_type == "Hadamard"]
    assert [node.attributes["interleave"].as_int() for node in nodes] == [runs, runs]
    assert "Transpose" not in {node.op_type for node in transformed.graph}


def test_linears_of_one_input_share_the_transform(mlp_quantized: Any) -> None:
    model = mlp_quantized(merged=False)
    one, same = OnlineTransform(16, DIAGONAL), OnlineTransform(16, DIAGONAL.copy())
    InsertOnlineTransformsPass({"mlp.gate": one, "mlp.up": same})(model)
    assert [node.op_type for node in model.graph].count("Hadamard") == 1
    inputs = {node.inputs[0] for node in model.graph if node.name in ("mlp.gate", "mlp.up")}
    assert len(inputs) == 1


def test_linears_whose_channels_take_other_turns_do_not(mlp_quantized: Any) -> None:
    model = mlp_quantized(merged=False)
    one, other = OnlineTransform(16, DIAGONAL), OnlineTransform(16, DIAGONAL, interleave=3)
    InsertOnlineTransformsPass({"mlp.gate": one, "mlp.up": other})(model)
    assert [node.op_type for node in model.graph].count("Hadamard") == 2


def _kronecker(right: bool) -> Kronecker:
    rng = np.random.default_rng(4)
    second = rng.normal(size=(8, 8)).astype(np.float32) if right else None
    return Kronecker(rng.normal(size=(6, 6)).astype(np.float32), second)


@pytest.mark.parametrize("right", [True, False])
def test_a_kronecker_product_is_that_of_numpy(
    quantized: Any, run: Any, ids: Any, relative_error: Any, right: bool
) -> None:
    """`x (left ⊗ right)` by stock operators in front of weights that expect it, and nothing of the bdq domain."""
    expected = run(quantized(kept=True).model, {"input_ids": ids})
    kronecker = _kronecker(right)
    whole = np.kron(kronecker.left.astype(np.float64), np.eye(8) if kronecker.right is None else kronecker.right)
    model: ir.Model = quantized(kept=True).model
    for node in note.with_role(model, note.LINEAR):
        if node.name in ("ab", "lm_head"):
            value = node.inputs[1]
            assert value is not None
            assert value.const_value is not None
            weight = np.linalg.inv(whole) @ value.const_value.numpy()
            value.const_value = ir.Tensor(weight.astype(np.float32), name=value.name)
    transform = OnlineTransform(1, kronecker=kronecker)
    linears = len(list(note.with_role(model, note.LINEAR)))
    InsertOnlineTransformsPass({"ab": transform, "lm_head": transform})(model)
    assert relative_error(run(model, {"input_ids": ids}), expected) < 1e-4
    assert len(list(note.with_role(model, note.LINEAR))) == linears
    assert len(list(note.with_role(model, note.ONLINE))) == (4 if right else 2)
    assert {node.domain for node in model.graph} == {""}


def test_linears_of_one_input_share_the_kronecker_product(mlp_quantized: Any) -> None:
    model = mlp_quantized(merged=False)
    one, same = (OnlineTransform(1, kronecker=_kronecker(True)) for _ in range(2))
    InsertOnlineTransformsPass({"mlp.gate": one, "mlp.up": same})(model)
    assert len(list(note.with_role(model, note.ONLINE))) == 2
    inputs = {node.inputs[0] for node in model.graph if node.name in ("mlp.gate", "mlp.up")}
    assert len(inputs) == 1
    other = mlp_quantized(merged=False)
    InsertOnlineTransformsPass({"mlp.gate": one, "mlp.up": OnlineTransform(1, kronecker=_kronecker(False))})(other)
    assert len(list(note.with_role(other, note.ONLINE))) == 3


@pytest.mark.parametrize(
    ("name", "transform", "message"),
    [
        ("ab", OnlineTransform(24), "of size 24 for 48 inputs"),
        ("ab", OnlineTransform(32), "of size 32 for 48 inputs"),
        ("ab", OnlineTransform(16, np.ones(40, np.float32)), r"a diagonal \(40,\), expected \(48,\)"),
        ("ab", OnlineTransform(1, kronecker=Kronecker(np.eye(5))), r"factors \(\(5, 5\), None\) for 48 inputs"),
        ("ab", OnlineTransform(1, kronecker=Kronecker(np.eye(6), np.eye(6))), "for 48 inputs"),
        ("ab", OnlineTransform(16, interleave=5), "5 runs of channels for 48 inputs"),
        ("nobody", OnlineTransform(16), "1 online transforms have no linear, the first is of nobody"),
    ],
)
def test_what_cannot_be_is_an_error(quantized: Any, name: str, transform: OnlineTransform, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InsertOnlineTransformsPass({name: transform})(quantized(kept=True).model)
