"""Cayley steps stay on the manifold and descend; the student is the folded model; the stage never ends worse."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.dynamic import DynamicBits, MutableQuantization
from bdq_export.fake_quant import fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.learning.end_to_end import checkpointed
from bdq_export.learning.rotation_stage import RotationOptions, learn
from bdq_export.learning.rotation_student import RotationStudent
from bdq_export.learning.rotations import Rotations, cayley_step
from bdq_export.progress import QuietProgress
from bdq_export.transform import Transforms, check_transforms, fold, online_by_path, random_hadamard
from bdq_runtime.specs import ActivationQuantization, OnlineTransform

FAMILIES = ("llama", "llama_biases", "mistral", "qwen2", "qwen3", "phi3")
TOKENS = torch.randint(3, 320, (20, 24), generator=torch.Generator().manual_seed(8))


def from_identity(matrix: torch.Tensor) -> float:
    return float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.float64)).abs().amax())


def start_of(tiny, seed: int = 5) -> Transforms:
    """Random R1, R2 and R4 with signs, and mixed heads."""
    dimensions, generator = tiny.dimensions, torch.Generator().manual_seed(seed)
    before, online = {}, {}
    for layer in range(dimensions.layers):
        channels = dimensions.intermediate_size
        before[layer, "mlp_middle"] = torch.randint(0, 2, (channels,), generator=generator).double() * 2 - 1
        online[layer, "mlp_middle"] = OnlineTransform(channels & -channels)
        attended = dimensions.heads * dimensions.head_dim
        online[layer, "value"] = OnlineTransform(attended & -attended, interleave=dimensions.heads)
    return Transforms(
        diagonals_before=before,
        residual_rotation=random_hadamard(dimensions.hidden_size, seed),
        head_rotations={layer: random_hadamard(dimensions.head_dim, seed + layer) for layer in range(3)},
        online=online,
    )


def student_of(tiny, start: Transforms, rotations: Rotations, bits: int | None) -> RotationStudent:
    power = tiny.dimensions.head_dim & (tiny.dimensions.head_dim - 1) == 0
    activation = None if bits is None else ActivationQuantization(bits, 0.8)
    head = None if bits is None else ActivationQuantization(8)
    cache = DynamicBits(bits, bits).cache(power)
    return RotationStudent(tiny.architecture, tiny.dimensions, start, rotations, activation, head, cache)


def rotations_of(start: Transforms) -> Rotations:
    return Rotations(start.residual_rotation, start.head_rotations)


def test_cayley_steps_stay_orthogonal_and_find_the_nearest_rotation():
    generator = torch.Generator().manual_seed(0)
    target = random_hadamard(24, 1)
    target[0] *= torch.linalg.det(target) * torch.linalg.det(random_hadamard(24, 2))  # the same component
    rotation = random_hadamard(24, 2)
    noise = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    distances = []
    for _ in range(400):
        distances.append(float((rotation - target).square().sum()))
        gradient = 2 * (rotation - target) + 1e-3 * noise  # its symmetric part leaves the manifold
        rotation = cayley_step(rotation, gradient.float(), rate=0.4)
        assert from_identity(rotation) < 1e-10
    assert max(after - before for before, after in pairwise(distances)) < 1e-2, "it does not descend"
    assert distances[-1] < 1e-2 * distances[0]


def test_a_small_step_is_the_steepest_one_on_the_manifold():
    generator = torch.Generator().manual_seed(1)
    rotation = random_hadamard(12, 3)
    gradient = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    moved = cayley_step(rotation, gradient, 1e-6)
    tangent = (gradient - rotation @ gradient.T @ rotation) / 2  # projection of the gradient
    torch.testing.assert_close((moved - rotation) / 1e-6, -tangent, rtol=1e-4, atol=1e-5)


def test_a_huge_gradient_or_rate_makes_a_bounded_step():
    rotation = random_hadamard(16, 0)
    gradient = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    moved = cayley_step(rotation, gradient * 1e12, 1e9)
    assert from_identity(moved) < 1e-12
    # α ‖Y‖₁ <= 1 bounds every angle by 2 atan(1/2).
    assert float(torch.linalg.eigvals(moved @ rotation.T).angle().abs().amax()) <= 2 * 0.4637
    assert torch.equal(cayley_step(rotation, torch.zeros(16, 16), 1.5), rotation)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_rounding_the_student_is_the_float_model(family, tiny_model):
    tiny = tiny_model(family)
    model, start = load_float_model(tiny, tiny.weights), start_of(tiny)
    with torch.no_grad():
        expected = model(TOKENS).logits
        with student_of(tiny, start, rotations_of(start), None).attached(model):
            got = model(TOKENS).logits
        error = float((got - expected).abs().amax() / expected.abs().amax())
        assert error < 1e-4
        assert torch.equal(model(TOKENS).logits, expected), "the model is not back"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
def test_the_student_computes_as_the_folded_model(family, bits, tiny_model):
    tiny = tiny_model(family)
    model, start = load_float_model(tiny, tiny.weights), start_of(tiny)
    student = student_of(tiny, start, rotations_of(start), bits)
    with torch.no_grad():
        plain = model(TOKENS).logits
        with student.attached(model):
            got = model(TOKENS).logits
    quantization = MutableQuantization(online=dict(online_by_path(tiny.architecture, start)))
    for layer in range(tiny.dimensions.layers):
        for path in tiny.architecture.linears:
            quantization.activations[tiny.architecture.layer_path(layer, path)] = student.activation
        quantization.kv[layer] = student.cache
    quantization.activations["lm_head"] = student.head
    folded = load_float_model(tiny, fold(tiny.architecture, tiny.dimensions, tiny.weights, start))
    with torch.no_grad(), fake_quantized(folded, tiny.architecture, tiny.dimensions, quantization.view):
        expected = folded(TOKENS).logits
    # A value on the edge between two codes may fall to either side, and everything after it moves.
    noise, difference = float((expected - plain).square().mean()), float((got - expected).square().mean())
    assert noise > 0
    assert difference < 0.1 * noise


def test_gradients_reach_every_rotation_and_checkpointing_does_not_change_them(tiny_model):
    tiny = tiny_model("llama")
    model, start, gradients = load_float_model(tiny, tiny.weights), start_of(tiny), []
    for through in (None, checkpointed):
        rotations = rotations_of(start)
        runner = BlockRunner(model, tiny.architecture.layers, TOKENS[:2], fast=False)
        with student_of(tiny, start, rotations, 4).attached(model):
            runner.differentiable(TOKENS[:2], through).square().mean().backward()
        gradients.append([each.grad for each in rotations])
    assert all(each is not None and each.any() for each in gradients[0])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.fixture
def learned(tiny_model):
    """`learned(judge=None, **options) -> (RotationResult, Rotations, start, tiny)` of a tiny Llama at a4kv4."""

    def run(judge=None, **options):
        tiny = tiny_model("llama")
        model, start = load_float_model(tiny, tiny.weights), start_of(tiny)
        # What the float model would say: a text that its predictions fit.
        with torch.no_grad():
            tokens = TOKENS.clone()
            for place in range(1, tokens.shape[1]):
                tokens[:, place] = model(tokens[:, :place]).logits[:, -1].argmax(-1)
        rotations = rotations_of(start)
        runner = BlockRunner(model, tiny.architecture.layers, tokens, fast=False)
        head = model.get_submodule("lm_head").weight.detach()

        def cross_entropy() -> float:
            with torch.no_grad():
                logits = model(tokens).logits[:, :-1]
            return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

        with student_of(tiny, start, rotations, 4).attached(model):
            judged = judge or cross_entropy
            result = learn(runner, rotations, head, tokens, judged, QuietProgress(), RotationOptions(**options))
        return result, rotations, start, tiny

    return run


def test_it_lowers_the_loss_and_stays_orthogonal(learned):
    result, rotations, start, tiny = learned(steps=40, batch=8, patience=9)
    assert result.after < 0.8 * result.before
    residual, heads = rotations.exact()
    assert from_identity(residual) < 1e-12
    assert not torch.equal(residual, start.residual_rotation)
    assert all(not torch.equal(matrix, start.head_rotations[layer]) for layer, matrix in heads.items())
    check_transforms(tiny.architecture, tiny.dimensions, Transforms({}, {}, residual, heads))


def test_what_is_never_better_is_dropped_and_it_stops_early(learned):
    losses = iter([1.0, *[2.0] * 9])
    result, rotations, start, _ = learned(judge=lambda: next(losses), steps=10, patience=2)
    assert (result.before, result.after, result.steps) == (1.0, 1.0, 4)
    assert torch.equal(rotations.exact()[0], start.residual_rotation)
    assert torch.equal(rotations.residual, start.residual_rotation.float())


def test_the_same_seed_gives_the_same_bits(learned):
    losses = [iter([3.0, 2.0, 1.0]) for _ in range(3)]
    first, second, other = (
        learned(judge=lambda each=each: next(each), steps=2, seed=seed)[1]
        for seed, each in zip((0, 0, 1), losses, strict=True)
    )
    assert all(torch.equal(one, two) for one, two in zip(first.values(), second.values(), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first.values(), other.values(), strict=True))
