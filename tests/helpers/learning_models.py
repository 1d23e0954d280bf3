"""What learned-stage tests compare with: the model and the hidden states of a quantized state, put together anew."""

from __future__ import annotations

import torch

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.fake_quant import FakeQuantization, fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.learning.state import QuantizedModel
from bdq_export.quantize.sequential import set_quantized


def model_of(tiny, state: QuantizedModel):
    """The torch model that computes with the values of `state`'s weights."""
    model = load_float_model(tiny, state.weights)
    set_quantized(model, tiny.architecture, state.quantized)
    return model


def expected_hidden(tiny, state: QuantizedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Outputs of the final norm of the fake-quantized model (before the rounding in front of lm_head)."""
    quantization = FakeQuantization(state.activations, state.online, state.kv)
    model = model_of(tiny, state)
    runner = BlockRunner(model, tiny.architecture.layers, tokens, fast=False)
    with fake_quantized(model, tiny.architecture, tiny.dimensions, quantization), torch.no_grad():
        return runner.differentiable(tokens)
