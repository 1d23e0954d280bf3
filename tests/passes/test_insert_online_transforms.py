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
from bdq_runtime.specs import OnlineTransform

DIAGONAL = np.linspace(0.5, 2, 48).astype(np.float32)


def _rotate(weight: Any, size: int, diagonal: Any) -> Any:
    """The weight `[N, K]` that computes the same on `hadamard(x) * diagonal`."""
    matrix = hadamard(np.eye(size, dtype=np.float32), size)
    rotated = np.concatenate([block @ matrix for block in np.split(weight, weight.shape[1] // size, axis=1)], axis=1)
    return (rotated / diagonal).astype(np.float32)


def _model(quantized: Any, transform: OnlineTransform | None = None) -> ir.Model:
    model: ir.Model = quantized(kept=True).model
    if transform is not None:
        for node in note.with_role(model, note.LINEAR):
            if node.name in ("ab", "lm_head"):
                value = node.inputs[1]
                assert value is not None
                assert value.const_value is not None
                diagonal = np.float32(1) if transform.diagonal is None else transform.diagonal
                weight = _rotate(value.const_value.numpy().T, transform.hadamard_size, diagonal)
                value.const_value = ir.Tensor(np.ascontiguousarray(weight.T), name=value.name)
        InsertOnlineTransformsPass({"ab": transform, "lm_head": transform})(model)
        attach_functions(model)
    return model


@pytest.mark.parametrize("diagonal", [None, DIAGONAL])
def test_the_same_function(quantized: Any, run: Any, ids: Any, relative_error: Any, diagonal: Any) -> None:
    expected = run(_model(quantized), {"input_ids": ids})
    found = run(_model(quantized, OnlineTransform(16, diagonal)), {"input_ids": ids})
    assert relative_error(found, expected) < 1e-5


def test_linears_of_one_input_share_the_transform(mlp_quantized: Any) -> None:
    model = mlp_quantized(merged=False)
    one, same = OnlineTransform(16, DIAGONAL), OnlineTransform(16, DIAGONAL.copy())
    InsertOnlineTransformsPass({"mlp.gate": one, "mlp.up": same})(model)
    assert [node.op_type for node in model.graph].count("Hadamard") == 1
    inputs = {node.inputs[0] for node in model.graph if node.name in ("mlp.gate", "mlp.up")}
    assert len(inputs) == 1


@pytest.mark.parametrize(
    ("name", "transform", "message"),
    [
        ("ab", OnlineTransform(24), "of size 24 for 48 inputs"),
        ("ab", OnlineTransform(32), "of size 32 for 48 inputs"),
        ("ab", OnlineTransform(16, np.ones(40, np.float32)), r"a diagonal \(40,\), expected \(48,\)"),
        ("nobody", OnlineTransform(16), "1 online transforms have no linear, the first is of nobody"),
    ],
)
def test_what_cannot_be_is_an_error(quantized: Any, name: str, transform: OnlineTransform, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InsertOnlineTransformsPass({name: transform})(quantized(kept=True).model)
