"""The student computes what the fake-quantized model computes, with any parameters, and can be taken off again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning_models import expected_hidden, model_of

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.learning.parameters import Parameters, initial_parameters, learned_state
from bdq_export.learning.student import learning
from bdq_runtime.specs import StaticKVQuantization

FAMILIES = ("llama", "llama_biases", "qwen2", "qwen3", "phi3", "gemma3")
TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(5))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def student_hidden(tiny, state, parameters: Parameters) -> torch.Tensor:
    model = model_of(tiny, state)
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    with learning(model, tiny.architecture, tiny.dimensions, state, parameters), torch.no_grad():
        hidden = runner.differentiable(TOKENS)
    return hidden


def moved(parameters: Parameters, size: float) -> Parameters:
    """Every number elsewhere; factors by about `size`, clips down."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for factor in parameters.factors():
            factor.add_(size * torch.randn(factor.shape, generator=generator))
        for clip in parameters.fractions():
            clip.mul_(0.9)
    return parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_alone(family, tiny_model, quantized_state, in_float32):
    """No rounding that could flip: equal, and a scale that is 1 % off is seen."""
    tiny = tiny_model(family)
    state = quantized_state(tiny, bits=None, online=False)
    parameters = initial_parameters(tiny.architecture, tiny.dimensions, state)
    expected = expected_hidden(tiny, state, TOKENS)
    assert distance(student_hidden(tiny, state, parameters), expected) < 1e-5
    with torch.no_grad():
        rows = next(iter(parameters.scales.values()))
        rows[::2].add_(0.01)  # not all of a head: the norms of query heads would undo it
    assert distance(student_hidden(tiny, state, parameters), expected) > 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_learned_state_is_what_the_student_computed(family, tiny_model, quantized_state, in_float32):
    """Folding parameters into scales, diagonals, gains and clips gives the same model; scales lose to 16 bits."""
    tiny = tiny_model(family)
    state = quantized_state(tiny)
    parameters = moved(initial_parameters(tiny.architecture, tiny.dimensions, state), 0.1)
    found = student_hidden(tiny, state, parameters)
    folded = learned_state(tiny.architecture, tiny.dimensions, state, parameters)
    assert distance(found, expected_hidden(tiny, folded, TOKENS)) < 0.05
    assert distance(found, expected_hidden(tiny, state, TOKENS)) > 0.1, "the parameters do not matter"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_folding_is_exact_up_to_half_precision(family, tiny_model, quantized_state, in_float32):
    tiny = tiny_model(family)
    state = quantized_state(tiny, bits=None, online=True)
    parameters = moved(initial_parameters(tiny.architecture, tiny.dimensions, state), 0.1)
    folded = learned_state(tiny.architecture, tiny.dimensions, state, parameters)
    assert distance(student_hidden(tiny, state, parameters), expected_hidden(tiny, folded, TOKENS)) < 2e-3
    for name, weight in folded.quantized.items():
        assert (weight.codes == state.quantized[name].codes).all(), "codes never change"
        assert (weight.scales == weight.scales.astype("float16")).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_static_cache_is_rounded_and_never_learned(bits, tiny_model, quantized_state, in_float32):
    tiny = tiny_model("qwen3")
    scales = np.random.default_rng(3).uniform(0.5, 2.0, (2, tiny.dimensions.kv_heads, tiny.dimensions.head_dim))
    cache = StaticKVQuantization(bits, *(scales * 2 / (1 << (bits - 1))).astype(np.float32))
    kv = dict.fromkeys(range(tiny.dimensions.layers), cache)
    state = replace(quantized_state(tiny, bits=None, online=False), kv=kv)
    parameters = initial_parameters(tiny.architecture, tiny.dimensions, state)
    assert not parameters.key_clips
    found = student_hidden(tiny, state, parameters)
    assert distance(found, expected_hidden(tiny, state, TOKENS)) < 0.01  # a code may tip over
    assert distance(found, expected_hidden(tiny, replace(state, kv={}), TOKENS)) > 0.02, "nothing is rounded"
    assert learned_state(tiny.architecture, tiny.dimensions, state, parameters).kv == kv


def test_the_model_is_itself_again_afterwards(tiny_model, quantized_state):
    tiny = tiny_model("phi3")
    state = quantized_state(tiny)
    model = model_of(tiny, state)
    before = model(TOKENS).logits
    with learning(
        model, tiny.architecture, tiny.dimensions, state, initial_parameters(tiny.architecture, tiny.dimensions, state)
    ):
        assert not torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model(TOKENS).logits, before)


def test_linears_of_a_site_share_clip_and_diagonal_afterwards(tiny_model, quantized_state):
    tiny = tiny_model("llama")
    state = quantized_state(tiny)
    parameters = moved(initial_parameters(tiny.architecture, tiny.dimensions, state), 0.1)
    folded = learned_state(tiny.architecture, tiny.dimensions, state, parameters)
    q, k = (f"model.layers.1.self_attn.{name}_proj" for name in "qk")
    assert folded.online[q] is folded.online[k]
    assert folded.activations[q] == folded.activations[k] != state.activations[q]
