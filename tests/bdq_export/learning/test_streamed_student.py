"""A student whose blocks are streamed learns the same bits, and holds what products read of one block only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lazy import Lazy
from learning_models import model_of
from torch.multiprocessing.reductions import StorageWeakRef

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.learning.end_to_end import checkpointed
from bdq_export.learning.parameters import all_sites, initial_parameters
from bdq_export.learning.scaled_product import ScaledWeight
from bdq_export.learning.student import learning
from bdq_export.scratch import Scratch
from bdq_export.streamed_blocks import held

TOKENS = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(8))
FLOAT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def states(tiny_model, quantized_state):
    """`states(family) -> (tiny, state in memory, the same of lazy weights)`; one linear is not quantized."""

    def make(family: str):
        tiny = tiny_model(family)
        state = quantized_state(tiny, bits=4)
        state = replace(state, quantized={name: each for name, each in state.quantized.items() if name != FLOAT})
        return tiny, state, replace(state, weights=Lazy(tiny.weights))

    return make


def gradients(tiny, state):
    """Of every parameter, by a loss that all of them move."""
    model = model_of(tiny, state)
    parameters = initial_parameters(tiny.architecture, tiny.dimensions, state)
    linears = [f"{path}.weight" for site in all_sites(tiny.architecture, tiny.dimensions) for path in site.paths]
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    with (
        held(model, without=linears),
        learning(model, tiny.architecture, tiny.dimensions, state, parameters),
    ):
        runner.differentiable(TOKENS, checkpointed).square().mean().backward()
    return [parameter.grad for parameter in parameters]


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2", "gemma3"])
def test_the_same_gradients(family, states):
    """Rows with one scale on both grids, blocks, a float linear, packed modules, biases, norms of heads."""
    tiny, whole, lazy = states(family)
    expected, found = gradients(tiny, whole), gradients(tiny, lazy)
    assert all(gradient is not None and gradient.any() for gradient in expected)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_what_products_read_is_of_one_block(states, monkeypatch):
    tiny, whole, lazy = states("llama")
    made, most, real = list[StorageWeakRef](), [0], ScaledWeight.of

    def noted(*given):
        weight = real(*given)
        made.append(StorageWeakRef(weight.values.untyped_storage()))
        most[0] = max(most[0], sum(not each.expired() for each in made))
        return weight

    monkeypatch.setattr(ScaledWeight, "of", noted)
    linears = len(tiny.architecture.linears)
    gradients(tiny, lazy)
    # Once forward, once more for the gradient; the float linear is not made of codes.
    assert len(made) == 2 * (3 * linears - 1)
    assert most[0] <= linears
    made.clear()
    gradients(tiny, whole)
    assert len(made) == most[0] == 3 * linears - 1, "in memory they are made once"


def test_float_linears_are_kept_on_the_disk_and_no_linear_is_read_again(states, monkeypatch):
    tiny, _, lazy = states("llama")
    model = model_of(tiny, lazy)
    parameters = initial_parameters(tiny.architecture, tiny.dimensions, lazy)
    linears = {name for name in tiny.weights if name.endswith("_proj.weight")}
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    kept, real = [], Scratch.keep
    monkeypatch.setattr(Scratch, "keep", lambda *given: kept.append(given[1].shape) or real(*given))
    lazy.weights.read.clear()
    with held(model, without=linears), learning(model, tiny.architecture, tiny.dimensions, lazy, parameters):
        assert linears & set(lazy.weights.read) == {FLOAT}
        assert kept == [tuple(tiny.weights[FLOAT].shape)]
        lazy.weights.read.clear()
        assert all(weight.is_meta for name, weight in model.named_parameters() if name in linears)
        with torch.no_grad():
            runner.differentiable(TOKENS)
        assert not lazy.weights.read
