"""The student of a block equals the block that its parameters fold to; learning it never makes it worse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.kronecker import kronecker_start
from bdq_export.fake_quant import FakeQuantization, fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.learning import block_student
from bdq_export.learning.block_parameters import BlockParameters, block_parameters, learned_transforms
from bdq_export.learning.block_stage import BlockOptions, flatquant_options, learn_block
from bdq_export.learning.block_student import BlockStudent
from bdq_export.learning.weight_rounding import RowGrids
from bdq_export.quantize.grid import searched_grid
from bdq_export.transform import Transforms, fold, online_by_path, random_hadamard
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
    """A diagonal on every edge; Λa, an online rotation and Λb where inputs of linears allow it; rotated heads."""
    rng = np.random.default_rng(3)
    before, after, online = {}, {}, {}
    for edge in tiny.architecture.edges:
        scale = tie(
            edge, tiny.dimensions, torch.from_numpy(np.exp(0.3 * rng.normal(size=tiny.dimensions.free_channels(edge))))
        )
        runs = tiny.dimensions.heads if edge.name == "value" else 1
        if edge.consumer_side is Side.INPUT:
            channels = consumer_channels(edge, tiny.dimensions)
            diagonal = np.exp(0.3 * rng.normal(size=channels)).astype(np.float32)
            online[LAYER, edge.name] = OnlineTransform(channels & -channels, diagonal, interleave=runs)
        if edge.consumer_side is Side.INPUT and edge.name != "value":
            before[LAYER, edge.name] = scale
        else:
            after[LAYER, edge.name] = scale
    heads = {LAYER: random_hadamard(tiny.dimensions.head_dim, 4)}
    return Transforms(after, before, head_rotations=heads, online=online)


def kronecker_transforms(tiny) -> Transforms:
    """FlatQuant's start, from made-up statistics of equally energetic inputs."""
    ones = {
        tiny.architecture.layer_path(layer, path): SimpleNamespace(energy=torch.ones(tiny.dimensions.input_size(path)))
        for layer in range(tiny.dimensions.layers)
        for path in tiny.architecture.linears
    }
    return kronecker_start(tiny.architecture, tiny.dimensions, tiny.weights, ones, seed=2)


def make(tiny, spec=None, activation=None, cache=None, transforms_of=random_transforms):
    """Model, runner and student of `random_transforms`; float unless told otherwise."""
    transforms = transforms_of(tiny)
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
        matrices = [each for factors in parameters.factors.values() for each in factors]
        for matrix in (*matrices, *([] if parameters.heads is None else [parameters.heads])):
            matrix.add_(0.2 * len(matrix) ** -0.5 * torch.randn(matrix.shape, generator=generator))


def block_output(runner: BlockRunner, student: BlockStudent, hidden: torch.Tensor) -> torch.Tensor:
    with student.attached(runner.model), torch.no_grad():
        return runner.block(LAYER, hidden)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transforms_of", [random_transforms, kronecker_transforms])
def test_without_rounding_no_parameter_changes_the_block(family, transforms_of, tiny_model):
    """Every diagonal and matrix cancels: what is multiplied on one side is divided on the other."""
    tiny = tiny_model(family)
    _, _, runner, student = make(tiny, transforms_of=transforms_of)
    plain = BlockRunner(load_float_model(tiny, tiny.weights), tiny.architecture.layers, TOKENS, fast=False)
    hidden = torch.randn(2, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain.block(LAYER, hidden)
    assert distance(block_output(runner, student, hidden), expected) < 1e-5
    moved(student.parameters)
    assert distance(block_output(runner, student, hidden), expected) < 1e-5
    with torch.no_grad():
        for parameter in student.parameters.after.values():
            parameter.add_(5.0)  # still cancels
            break
    assert distance(block_output(runner, student, hidden), expected) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transforms_of", [random_transforms, kronecker_transforms])
def test_folding_gives_what_was_learned(family, transforms_of, tiny_model):
    """The rounded block of the folded transforms is the student's: same grids, same clips."""
    tiny = tiny_model(family)
    activation, power = ActivationQuantization(8, 0.9), tiny.dimensions.head_dim
    cache = KVQuantization(8, 8, 0.95, 0.95, hadamard=power & (power - 1) == 0)
    transforms, _, runner, student = make(tiny, None, activation, cache, transforms_of)
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


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, PerChannel(), grid=ODD), QuantSpec(3, PerBlock(16)), QuantSpec(2, PerChannel(), grid=ODD)]
)
def test_gradients_are_those_of_the_formula_straight_through(spec):
    """Of values inside of the grid and beyond both of its ends, where only the step moves them."""
    generator = torch.Generator().manual_seed(2)
    weight, upstream = (torch.randn(24, 48, generator=generator) for _ in range(2))
    grids = RowGrids(spec, 0.7 * RowGrids.searched(weight, spec).reach)
    log_reach = 0.1 * torch.randn(24, 1, generator=generator)

    def formula(weight, log_reach):
        levels = (1 << spec.bits) - 1
        half, offset = (levels / 2, 0.5) if spec.grid == ODD else ((levels - 1) / 2, 0.0)
        blocks = weight.reshape(24, -1, 48 if isinstance(spec.granularity, PerChannel) else 16)
        largest = blocks.detach().abs().amax(-1)
        steps = (largest * grids.reach * log_reach.exp() / half).unsqueeze(-1)
        exact = (blocks / steps - offset).clamp(-(1 << (spec.bits - 1)), (1 << (spec.bits - 1)) - 1)
        return ((exact + (exact.round() - exact).detach() + offset) * steps).flatten(1)

    results = []
    for function in (grids.round, formula):
        leaves = weight.clone().requires_grad_(), log_reach.clone().requires_grad_()
        values = function(*leaves)
        results.append((values.detach(), *torch.autograd.grad((values * upstream).sum(), leaves)))
    (found, by_weight, by_reach), (expected, *gradients) = results
    assert torch.equal(found, expected)
    assert 0 < int((gradients[0] == 0).sum()) < weight.numel() // 2, "values beyond the grid, and inside"
    torch.testing.assert_close(by_weight, gradients[0])
    assert distance(by_reach, gradients[1]) < 2e-3  # kept in bfloat16


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


def test_one_sequence_is_learned_from_and_judges(tiny_model):
    tiny = tiny_model("llama")
    _, _, runner, student = make(tiny, QuantSpec(4, PerChannel(), grid=ODD), ActivationQuantization(4, 0.8))
    hidden = torch.randn(1, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    plain = BlockRunner(load_float_model(tiny, tiny.weights), tiny.architecture.layers, TOKENS, fast=False)
    with torch.no_grad():
        expected = plain.block(LAYER, hidden)
    found = learn_block(runner, student, hidden, expected, BlockOptions(steps=24, rate=1e-2))
    assert found.after < found.before


def test_matrices_and_clips_of_flatquant_are_learned(tiny_model):
    tiny = tiny_model("llama_biases")
    activation, cache = ActivationQuantization(4, 0.8), KVQuantization(4, 4, 0.95, 0.95, hadamard=True)
    made = [make(tiny, QuantSpec(4, PerChannel(), grid=ODD), activation, cache, kronecker_transforms) for _ in range(2)]
    _, _, runner, student = made[0]
    plain = BlockRunner(load_float_model(tiny, tiny.weights), tiny.architecture.layers, TOKENS, fast=False)
    hidden = torch.randn(8, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden[..., :5] *= 20  # outliers, of which the start does not know
    with torch.no_grad():
        expected = plain.block(LAYER, hidden)
    start = student.parameters.values()
    assert all(float(student.parameters.clip(path).detach()) == pytest.approx(0.8) for path in student.parameters.clips)
    options = replace(flatquant_options(0), steps=60)
    found = learn_block(runner, student, hidden, expected, options)
    assert found.after < 0.9 * found.before
    now = student.parameters.values()
    assert not any(torch.equal(one, two) for one, two in zip(start, now, strict=True) if one.abs().sum() > 0)
    assert student.parameters.well_conditioned()
    again = learn_block(*made[1][2:], hidden, expected, options)
    assert again == found, "a seed gives the same bits"


def test_what_cannot_be_folded_is_not_kept(tiny_model, monkeypatch):
    """However low the error: folding it would lose digits, and be refused."""
    tiny = tiny_model("llama")
    _, _, runner, student = make(
        tiny, QuantSpec(4, PerChannel()), ActivationQuantization(4, 0.8), None, kronecker_transforms
    )
    hidden = torch.randn(8, 16, tiny.dimensions.hidden_size, generator=torch.Generator().manual_seed(1))
    start = student.parameters.values()
    with torch.no_grad():
        matrix = student.parameters.factors["mlp_in"][0]
        matrix[0] *= 1e-5
    assert not student.parameters.well_conditioned()
    student.parameters.set_values(start)
    assert student.parameters.well_conditioned()
    monkeypatch.setattr(BlockParameters, "well_conditioned", lambda _: False)
    found = learn_block(runner, student, hidden, hidden, replace(flatquant_options(0), steps=8))
    assert found.after == found.before
    assert all(torch.equal(one, two) for one, two in zip(start, student.parameters.values(), strict=True))


@pytest.mark.parametrize(
    "spec", [QuantSpec(4, PerChannel(), grid=ODD), QuantSpec(3, PerBlock(16)), QuantSpec(8, PerChannel())]
)
def test_the_stored_grid_is_the_one_that_was_learned_with(spec):
    generator = torch.Generator().manual_seed(2)
    weight, reach = torch.randn(24, 48, generator=generator), 0.1 * torch.randn(24, 1, generator=generator)
    grids = RowGrids.searched(weight, spec)
    grid = grids.grid(weight, reach)
    found = grid.values(grid.codes(weight))
    expected = grids.round(weight, reach)
    assert grid.spec == spec
    # Scales are rounded to 16 bits, and a few weights lie between two levels.
    assert float(((found - expected).abs() - 1e-3 * expected.abs()).quantile(0.98)) < 1e-6
