"""The student of a block equals the block that its parameters fold to; learning it never makes it worse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.fake_quant import FakeQuantization, fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.learning import block_student
from bdq_export.learning.block_parameters import BlockParameters, block_parameters, learned_transforms
from bdq_export.learning.block_stage import BlockOptions, learn_block
from bdq_export.learning.block_student import BlockStudent
from bdq_export.learning.weight_rounding import RowGrids
from bdq_export.quantize.grid import searched_grid
from bdq_export.transform import Transforms, fold, online_by_path
from bdq_export.transform.channels import consumer_channels, tie
from bdq_models import Side
from bdq_runtime.packing import ODD, PerBlock, PerChannel, QuantSpec
from bdq_runtime.specs import ActivationQuantization, KVQuantization, OnlineTransform

FAMILIES = ("llama", "llama_biases", "qwen2", "qwen3", "phi3", "gemma3")
TOKENS = torch.randint(3, 320, (8, 16), generator=torch.Generator().manual_seed(5))
LAYER = 1


@pytest.fixture(autouse=True)
def _in_float32(monkeypatch):
    monkeypatch.setattr(block_student, "product_dtype", lambda: torch.float32)


def random_transforms(tiny) -> Transforms:
    """A diagonal on every edge; Λa, an online rotation and Λb where inputs of linears allow it."""
    rng = np.random.default_rng(3)
    before, after, online = {}, {}, {}
    for edge in tiny.architecture.edges:
        scale = tie(
            edge, tiny.dimensions, torch.from_numpy(np.exp(0.3 * rng.normal(size=tiny.dimensions.free_channels(edge))))
        )
        if edge.consumer_side is Side.INPUT and edge.name != "value":
            channels = consumer_channels(edge, tiny.dimensions)
            diagonal = np.exp(0.3 * rng.normal(size=channels)).astype(np.float32)
            online[LAYER, edge.name] = OnlineTransform(channels & -channels, diagonal)
            before[LAYER, edge.name] = scale
        else:
            after[LAYER, edge.name] = scale
    return Transforms(after, before, online=online)


def make(tiny, spec=None, activation=None, cache=None):
    """Model, runner and student of `random_transforms`; float unless told otherwise."""
    transforms = random_transforms(tiny)
    weights = fold(tiny.architecture, tiny.dimensions, tiny.weights, transforms)
    model = load_float_model(tiny, weights)
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    parameters = block_parameters(tiny.architecture, tiny.dimensions, LAYER, transforms, activation, cache)
    student = BlockStudent(
        tiny.architecture,
        tiny.dimensions,
        LAYER,
        transforms,
        weights,
        lambda _path: spec,
        parameters,
        activation,
        cache,
    )
    return transforms, weights, runner, student


def moved(parameters: BlockParameters) -> None:
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in (*parameters.before.values(), *parameters.after.values()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def block_output(runner: BlockRunner, student: BlockStudent, hidden: torch.Tensor) -> torch.Tensor:
    with student.attached(runner.model), torch.no_grad():
        return runner.block(LAYER, hidden)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rounding_no_parameter_changes_the_block(family, tiny_model):
    """Every diagonal cancels: what is multiplied on one side is divided on the other."""
    tiny = tiny_model(family)
    _, _, runner, student = make(tiny)
    plain = BlockRunner(load_float_model(tiny, tiny.weights), tiny.architecture.layers, TOKENS, fast=False)
    hidden = torch.randn(2, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain.block(LAYER, hidden)
    assert distance(block_output(runner, student, hidden), expected) < 1e-5
    moved(student.parameters)
    assert distance(block_output(runner, student, hidden), expected) < 1e-5
    with torch.no_grad():
        next(iter(student.parameters.after.values())).add_(5.0)  # still cancels
    assert distance(block_output(runner, student, hidden), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_gives_what_was_learned(family, tiny_model):
    """The rounded block of the folded transforms is the student's: same grids, same clips."""
    tiny = tiny_model(family)
    activation, power = ActivationQuantization(8, 0.9), tiny.dimensions.head_dim
    cache = KVQuantization(8, 8, 0.95, 0.95, hadamard=power & (power - 1) == 0)
    transforms, _, runner, student = make(tiny, None, activation, cache)
    moved(student.parameters)
    hidden = torch.randn(2, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    found = block_output(runner, student, hidden)
    learned = learned_transforms(tiny.architecture, tiny.dimensions, LAYER, transforms, student.parameters)
    weights = fold(tiny.architecture, tiny.dimensions, tiny.weights, learned)
    online = online_by_path(tiny.architecture, learned)
    quantization = FakeQuantization(
        {tiny.architecture.layer_path(LAYER, path): activation for path in tiny.architecture.linears},
        online,
        {LAYER: cache},
    )
    model = load_float_model(tiny, weights)
    after = BlockRunner(model, tiny.architecture.layers, TOKENS, fast=False)
    with fake_quantized(model, tiny.architecture, tiny.dimensions, quantization), torch.no_grad():
        expected = after.block(LAYER, hidden)
    assert distance(found, expected) < 1.5e-2  # codes that flip at 8 bits
    unmoved = FakeQuantization(quantization.activations, online_by_path(tiny.architecture, transforms), quantization.kv)
    with fake_quantized(model, tiny.architecture, tiny.dimensions, unmoved), torch.no_grad():
        assert distance(found, after.block(LAYER, hidden)) > 2e-2, "the parameters do not matter"


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, PerChannel(), grid=ODD), QuantSpec(3, PerBlock(16)), QuantSpec(2, PerChannel(), grid=ODD)]
)
def test_grids_start_where_the_search_ends(spec):
    weight = torch.randn(24, 48, generator=torch.Generator().manual_seed(2))
    grids = RowGrids.searched(weight, spec)
    found = grids.round(weight, torch.zeros(24, 1))
    grid = searched_grid(weight, spec)
    expected = grid.values(grid.codes(weight))
    ours, theirs = (float((each - weight).square().mean()) for each in (found, expected))
    assert ours < 1.1 * theirs
    levels = {round(float(value), 3) for value in found[0, :16] / found[0, :16].abs().min()}
    assert len(levels) <= 1 << spec.bits


def test_learning_lowers_the_held_out_error_and_bad_rates_change_nothing(tiny_model):
    tiny = tiny_model("llama")
    activation = ActivationQuantization(4, 0.8)
    _, _, runner, student = make(tiny, QuantSpec(4, PerChannel(), grid=ODD), activation)
    plain = BlockRunner(load_float_model(tiny, tiny.weights), tiny.architecture.layers, TOKENS, fast=False)
    hidden = torch.randn(8, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain.block(LAYER, hidden)
    start = student.parameters.values()
    bad = learn_block(runner, student, hidden, expected, BlockOptions(steps=8, rate=20.0))
    assert bad.after == bad.before
    assert all(torch.equal(one, two) for one, two in zip(start, student.parameters.values(), strict=True))
    good = learn_block(runner, student, hidden, expected, BlockOptions(steps=60, rate=1e-2))
    assert good.before == bad.before
    assert good.after < 0.9 * good.before
    again = make(tiny, QuantSpec(4, PerChannel(), grid=ODD), activation)[3]
    second = learn_block(runner, again, hidden, expected, BlockOptions(steps=60, rate=1e-2))
    assert second == good, "a seed gives the same bits"
