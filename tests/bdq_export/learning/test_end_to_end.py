"""The stage never ends worse than it began, gives the same numbers for the same seed, and checkpoints exactly."""

from __future__ import annotations

import pytest
import torch
from learning_models import model_of

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.float_model import load_float_model
from bdq_export.learning.end_to_end import Sequences, TuningOptions, checkpointed, teacher_states, tune
from bdq_export.learning.heads import Heads
from bdq_export.learning.parameters import initial_parameters
from bdq_export.learning.student import learning
from bdq_export.progress import QuietProgress

TOKENS = torch.randint(3, 320, (20, 24), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def tuned(tiny_model, quantized_state):
    """`tuned(**options) -> (TuningResult, Parameters)` of a tiny Llama at w4a4kv4."""

    def run(already_right=False, **options):
        tiny = tiny_model("llama")
        state = quantized_state(tiny, bits=None if already_right else 4, online=not already_right)
        model = model_of(tiny, state)
        twin = model if already_right else load_float_model(tiny, tiny.weights)
        layers = tiny.architecture.layers
        train, held = (
            Sequences(part, teacher_states(BlockRunner(twin, layers, part))) for part in (TOKENS[:16], TOKENS[16:])
        )
        heads = Heads(*(each.get_submodule("lm_head").weight.detach().bfloat16() for each in (model, twin)))
        parameters = initial_parameters(tiny.architecture, tiny.dimensions, state)
        runner = BlockRunner(model, layers, TOKENS[:16], fast=False)
        with learning(model, tiny.architecture, tiny.dimensions, state, parameters):
            result = tune(runner, parameters, heads, train, held, QuietProgress(), TuningOptions(**options))
        return result, parameters

    return run


def test_it_lowers_the_held_out_loss(tuned):
    result, _ = tuned(epochs=4, rate=1e-2, patience=100)
    assert result.after < 0.9 * result.before
    assert result.steps == 4 * 8


def test_a_rate_that_destroys_the_model_changes_nothing(tuned):
    result, parameters = tuned(already_right=True, epochs=2, rate=1.0, patience=2)
    assert result.after == result.before < 0.05
    assert result.steps < 16, "it did not stop early"
    assert all(not factor.any() for factor in parameters.factors())


def test_the_same_seed_gives_the_same_bits(tuned):
    first, second, other = (tuned(epochs=1, seed=seed)[1].values() for seed in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


def test_checkpointing_does_not_change_gradients(tiny_model, quantized_state):
    tiny = tiny_model("gemma3")
    state = quantized_state(tiny, bits=4)
    model = model_of(tiny, state)
    gradients = []
    for through in (None, checkpointed):
        parameters = initial_parameters(tiny.architecture, tiny.dimensions, state)
        runner = BlockRunner(model, tiny.architecture.layers, TOKENS[:2], fast=False)
        with learning(model, tiny.architecture, tiny.dimensions, state, parameters):
            runner.differentiable(TOKENS[:2], through).square().mean().backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert all(gradient is not None and gradient.any() for gradient in gradients[0]), "a parameter has no effect"
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_labels_are_the_next_tokens():
    labels = Sequences(TOKENS, TOKENS[..., None]).labels()
    assert torch.equal(labels[:, :-1], TOKENS[:, 1:])
    assert bool((labels[:, -1] == -1).all())
