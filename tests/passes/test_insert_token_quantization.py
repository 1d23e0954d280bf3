"""Inputs of linears are rounded as the activation rule says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bdq_passes import InsertTokenQuantizationPass
from bdq_passes import annotations as note
from bdq_passes.functions import attach_functions
from bdq_runtime.reference import dynamic_fake_quantize
from bdq_runtime.specs import ActivationQuantization


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_float_weights_read_rounded_inputs(mlp_quantized: Any, run: Any, hidden: Any, bits: int) -> None:
    model = mlp_quantized(merged=False, kept=True)
    weight = next(node.inputs[1].const_value.numpy() for node in model.graph if node.name == "mlp.gate")
    model.graph.outputs.append(next(node.outputs[0] for node in model.graph if node.name == "mlp.gate"))
    model.graph.outputs[-1].shape = None
    spec = ActivationQuantization(bits, 0.8)
    InsertTokenQuantizationPass({"mlp.gate": spec, "mlp.up": spec})(model)
    attach_functions(model)
    expected = dynamic_fake_quantize(hidden, bits, 0.8) @ weight
    np.testing.assert_allclose(run(model, {"x": hidden})[1], expected, rtol=1e-5, atol=1e-5)
    wrong = dynamic_fake_quantize(hidden, bits, 0.808) @ weight
    assert np.abs(wrong - expected).max() > 1e-3


def test_linears_of_one_input_share_the_node(mlp_quantized: Any) -> None:
    model = mlp_quantized(merged=False)
    spec = ActivationQuantization(4)
    InsertTokenQuantizationPass({name: spec for name in ("mlp.gate", "mlp.up", "mlp.down")})(model)
    assert [node.op_type for node in model.graph].count("DynamicFakeQuantize") == 2
    assert {note.activation_bits(node) for node in note.with_role(model, note.LINEAR)} == {4}


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("mlp.up", ActivationQuantization(16), "activations of 16 bits, expected 3, 4 or 8"),
        ("mlp.up", ActivationQuantization(4, 1.5), "activation clip 1.5"),
        ("mlp.up", ActivationQuantization(4, float("nan")), "activation clip nan"),
        ("nobody", ActivationQuantization(4), "the first is of nobody"),
    ],
)
def test_what_cannot_be_is_an_error(mlp_quantized: Any, name: str, spec: ActivationQuantization, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InsertTokenQuantizationPass({name: spec})(mlp_quantized(merged=False))
