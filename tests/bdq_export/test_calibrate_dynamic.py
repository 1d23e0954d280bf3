"""Calibration of schemes whose activations or cache are quantized when the model runs."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from calibrations import calibrate_tiny

import bdq_export.calibrate as module
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.output_curvature import OutputCurvature
from bdq_export.fake_quant import FakeQuantization, fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.quantize import sequential
from bdq_export.quantize.sequential import set_quantized
from bdq_export.transform.output_scales import output_scales
from bdq_runtime.packing import ODD, PerChannel
from bdq_runtime.specs import ActivationQuantization, StaticKVQuantization

FAMILIES = ("llama", "llama_biases", "qwen2", "qwen3", "phi3", "gemma3")


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_model):
    """Calibrate a tiny model: `run(tiny, **options) -> CalibrationResult`; the torch model must be float again."""
    directory = write_model(tmp_path_factory.mktemp("calibrate") / "model")  # for its tokenizer
    return lambda tiny, **options: calibrate_tiny(tiny, directory, **options)


def loss_of(tiny, result, quantization=None) -> float:
    """Loss on the held-back tokens of what a result says, put together from scratch."""
    loss = HeldOutLoss(load_float_model(tiny, tiny.weights), tiny.architecture.layers, result.held_back)
    model = load_float_model(tiny, result.weights)
    set_quantized(model, tiny.architecture, result.quantized)
    loss._runner.model = model
    loss._runner.blocks = list(model.get_submodule(tiny.architecture.layers).children())
    quantization = quantization or FakeQuantization(result.activations, result.online, result.kv)
    with fake_quantized(model, tiny.architecture, tiny.dimensions, quantization):
        return loss()


def test_auto_leaves_out_a_second_gptq_only_where_the_transform_obviously_wins(tiny_model, run, monkeypatch):
    tiny, ran = tiny_model("llama"), []
    real = module._Calibration._quantize

    def recorded(self, candidate, *stage, **more):
        ran.append(candidate.name)
        return real(self, candidate, *stage, **more)

    monkeypatch.setattr(module._Calibration, "_quantize", recorded)
    monkeypatch.setattr(module, "choose", lambda measured, tied: ("bdq-online", "made up"))
    options = {"scheme": "w4a4kv4", "transform": "auto", "effort": "fast"}
    for part, both in ((0.0, True), (1e9, False)):
        monkeypatch.setattr(module, "_OBVIOUSLY", part)
        ran.clear()
        run(tiny, **options)
        assert ran == (["none", "bdq-online"] if both else ["bdq-online"])


@pytest.mark.parametrize(
    ("options", "weighs"),
    [({}, True), ({"effort": "fast"}, False), ({"effort": "best"}, True), ({"transform": "kronecker"}, False)],
)
def test_gptq_weighs_outputs_and_tokens_where_no_matrix_is_learned_first(options, weighs, tiny_model, run, monkeypatch):
    tiny, outputs, weights = tiny_model("llama"), [], []
    real, observer = sequential.gptq, sequential.InputObserver

    def recorded(weight, hessian, spec, options, grid, factors=()):
        outputs.append((len(weight), [len(factor) for factor in factors]))
        return real(weight, hessian, spec, options, grid, factors)

    def observed(hessians, **more):
        weights.append(more["weights"])
        return observer(hessians, **more)

    monkeypatch.setattr(sequential, "gptq", recorded)
    monkeypatch.setattr(sequential, "InputObserver", observed)
    run(tiny, **{"scheme": "w4a4kv4", "transform": "bdq", **options})
    assert len(outputs) == 4 * tiny.dimensions.layers == len(weights)
    for (rows, groups), tokens in zip(outputs, weights, strict=True):
        assert sum(groups) == (rows if weighs else 0)
        assert (tokens is not None) == weighs
        assert tokens is None or float(tokens.std()) > 0


def test_gptq_behind_learned_blocks_weighs_the_outputs_that_they_left(tiny_model, run, monkeypatch):
    tiny, given = tiny_model("llama"), {}
    factors = OutputCurvature.factors

    def recorded(curvature, path):
        given[path] = curvature.output_scales.get(path)
        return factors(curvature, path)

    monkeypatch.setattr(OutputCurvature, "factors", recorded)
    options = {"scheme": "w4a4kv4", "transform": "bdq"}
    closed, learned = (run(tiny, **options, effort=effort).transforms for effort in ("fast", "best"))
    expected = {}
    for layer in range(tiny.dimensions.layers):
        expected |= output_scales(tiny.architecture, tiny.dimensions, layer, closed, learned)
    assert {path.rsplit(".", 1)[1] for path in expected} == {"q_proj", "k_proj", "v_proj", "up_proj"}
    assert {path for path, scale in given.items() if scale is not None} == set(expected)
    assert all(torch.equal(given[path], scale) for path, scale in expected.items())


def test_gptq_aims_at_float_inputs_and_weighs_outputs_of_weights_alone(tiny_model, run, monkeypatch):
    """Tokens are not weighed then: the correction towards the float model's inputs needs all of them."""
    tiny, outputs, aimed = tiny_model("llama"), [], []
    real, observer = sequential.gptq, sequential.GapObserver

    def recorded(weight, hessian, spec, options, grid, factors=()):
        outputs.append(len(weight) == sum(len(factor) for factor in factors))
        return real(weight, hessian, spec, options, grid, factors)

    class Recorded(observer):
        def corrected(self, weight, hessian):
            aimed.append(weight)
            return super().corrected(weight, hessian)

    def plain(*_args, **_more):
        raise AssertionError("inputs of the float model are not looked at")

    monkeypatch.setattr(sequential, "gptq", recorded)
    monkeypatch.setattr(sequential, "InputObserver", plain)
    monkeypatch.setattr("bdq_export.quantize.correction.GapObserver", Recorded)
    monkeypatch.setattr(sequential, "GapObserver", Recorded)
    run(tiny, scheme="w4a16", transform="none", effort="best")
    assert outputs == [True] * (4 * tiny.dimensions.layers)
    assert len(aimed) == len(outputs)


@pytest.mark.parametrize("weights", ["gptq", "rtn"])
def test_a_fixed_clip_is_that_of_every_site_and_of_no_cache(weights, tiny_model, run):
    tiny = tiny_model("llama")
    options = {"scheme": "w4a4kv4", "transform": "hadamard", "effort": "fast", "weights": weights}
    found = run(tiny, **options, activation_clip=0.65)
    head = found.activations[tiny.architecture.lm_head]
    blocks = {path: each for path, each in found.activations.items() if each is not head}
    assert len(blocks) == 7 * tiny.dimensions.layers
    assert {each.clip for each in blocks.values()} == {0.65}
    assert {(each.key_clip, each.value_clip) for each in found.kv.values()} == {(1.0, 1.0)}
    searched = run(tiny, **options)
    assert len({each.clip for path, each in searched.activations.items() if path in blocks}) > 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w4a4kv4", "w3a3kv3"])
def test_every_linear_and_layer_is_quantized(family, scheme, tiny_model, run):
    tiny = tiny_model(family)
    result = run(tiny, scheme=scheme, transform="bdq", weights="rtn")
    bits = int(scheme[3])
    paths = {tiny.architecture.layer_path(layer, path) for layer in range(3) for path in tiny.architecture.linears}
    assert set(result.activations) == paths | {"lm_head"}
    assert result.activations["lm_head"].bits == 8
    assert result.activations["lm_head"].clip == 1
    assert all(result.activations[path].bits == bits for path in paths)
    assert all(0.4 <= result.activations[path].clip <= 1 for path in paths)
    assert {layer: (spec.key_bits, spec.value_bits) for layer, spec in result.kv.items()} == dict.fromkeys(
        range(3), (bits, bits)
    )
    assert len(result.activation_flatness) == 3 * 4
    for names in dict(tiny.architecture.residual_readers).values():
        shared = {id(result.online[tiny.architecture.layer_path(0, path)]) for path in names}
        assert len(shared) == 1, "the linears of a site share one transform"
        grids = {result.quantized[f"{tiny.architecture.layer_path(0, path)}.weight"].spec.grid for path in names}
        assert len(grids) == 1, "and one grid"
    for path in paths:
        weight = result.quantized[f"{path}.weight"]
        assert weight.spec.granularity == PerChannel()
        assert np.array_equal(weight.scales.astype(np.float16).astype(np.float32), weight.scales)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_the_parts_of_a_result_belong_together(family, tiny_model, run):
    tiny = tiny_model(family)
    result = run(tiny, scheme="w4a8kv8", transform="hadamard", weights="gptq", ops="bdq")
    assert result.online
    right = loss_of(tiny, result)
    assert right < 0.5 * loss_of(tiny, result, FakeQuantization(result.activations, {}, result.kv))
    wrong = {path: ActivationQuantization(8, 0.1) for path in result.activations}
    assert right < 0.5 * loss_of(tiny, result, FakeQuantization(wrong, result.online, result.kv))


@pytest.mark.parametrize(
    "options",
    [
        {"effort": "best", "transform": "bdq"},
        pytest.param({"effort": "fast", "transform": "kronecker"}, marks=pytest.mark.slow),
        pytest.param({"transform": "spin"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: options["transform"],
)
def test_two_sequences_suffice_for_everything_that_is_learned(options, tiny_model, run):
    """One is held out, so that one alone is left to learn from."""
    result = run(tiny_model("llama"), scheme="w4a4kv4", calib_samples=2, **options)
    assert np.isfinite(result.loss)
    told = any("one calibration sequence is left to learn blocks from" in warning for warning in result.warnings)
    assert told == (options["transform"] != "spin")


def test_a_stage_of_the_effort_that_is_left_out_is_told(tiny_model, run):
    """It is part of GPTQ, and the rest of the effort is made."""
    result = run(tiny_model("llama"), scheme="w4a4kv4", transform="bdq", effort="best", weights="rtn")
    assert result.learned is not None
    assert any("leaves out the block-wise stage" in warning for warning in result.warnings)


def test_learned_rotations_are_kept_where_they_lose_less_than_random_ones(tiny_model, run):
    tiny = tiny_model("phi3")
    options = {"scheme": "w16a4kv4", "effort": "fast"}
    spin, random = (run(tiny, transform=name, **options) for name in ("spin", "hadamard"))
    after, before = (float(each) for each in re.findall(r"(\d+\.\d{4})", spin.reason))
    assert after <= before
    residual, start = (each.transforms.residual_rotation for each in (spin, random))
    assert residual is not None
    assert residual.dtype == torch.float64
    assert bool(torch.equal(residual, start)) == (after == before)
    for layer, matrix in random.transforms.head_rotations.items():
        assert torch.equal(spin.transforms.head_rotations[layer], matrix) == (after == before)
    assert spin.online.keys() == random.online.keys()
    again = run(tiny, transform="spin", **options)
    assert torch.equal(again.transforms.residual_rotation, residual)
    assert again.loss == spin.loss


def test_the_same_seed_gives_the_same_bytes(tiny_model, run):
    tiny = tiny_model("llama")
    results = [run(tiny, scheme="w4a4kv4", weights="gptq", seed=3) for _ in range(2)]
    first, second = results
    assert first.loss == second.loss
    assert first.activations == second.activations
    assert first.kv == second.kv
    for name, weight in first.quantized.items():
        assert np.array_equal(weight.codes, second.quantized[name].codes)
        assert np.array_equal(weight.scales, second.quantized[name].scales)
    for path, online in first.online.items():
        assert np.array_equal(online.diagonal, second.online[path].diagonal)


def test_auto_measures_with_quantized_activations_and_keeps_the_best(tiny_model, run):
    tiny = tiny_model("llama")
    result = run(tiny, scheme="w4a4kv4", weights="rtn")
    losses = {candidate.name: candidate.loss for candidate in result.candidates}
    assert set(losses) == {"none", "bdq-online"}
    assert losses[result.transform] == min(losses.values())


def test_weights_lie_on_the_odd_grid_where_it_fits_better_and_operators_read_it(tiny_model, run):
    result = run(tiny_model("llama_biases"), scheme="w2a8", transform="none", weights="rtn", ops="bdq")
    assert ODD in {weight.spec.grid for weight in result.quantized.values()}
    result = run(tiny_model("llama_biases"), scheme="w2a16kv8", transform="none", weights="rtn")
    assert ODD not in {weight.spec.grid for weight in result.quantized.values()}


def test_a_quantized_cache_alone_changes_no_linear(tiny_model, run):
    tiny = tiny_model("llama")
    result = run(tiny, scheme="w4a16kv4", transform="bdq", weights="gptq")
    assert not result.activations
    assert not result.online
    assert set(result.kv) == {0, 1, 2}
    assert all(spec.hadamard for spec in result.kv.values())


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "w4a16kv4", "transform": "none", "weights": "rtn"},
        {"scheme": "w8a16kv8", "transform": "bdq", "weights": "gptq"},
        {"scheme": "w4a4kv4", "transform": "hadamard", "weights": "gptq", "effort": "fast"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_static_cache_is_what_was_measured(family, options, tiny_model, run):
    tiny = tiny_model(family)
    result = run(tiny, **options, kv_scales="static", calib_samples=8)  # one sequence is held out: it judges both
    assert sorted(result.kv) == list(range(tiny.dimensions.layers))
    shape = (tiny.dimensions.kv_heads, tiny.dimensions.head_dim)
    for cache in result.kv.values():
        assert isinstance(cache, StaticKVQuantization)
        assert cache.key_scales.shape == cache.value_scales.shape == shape
    right = loss_of(tiny, result)
    assert right == pytest.approx(result.loss, rel=1e-3)
    wrong = {
        layer: replace(cache, key_scales=cache.key_scales * np.float32(1.05)) for layer, cache in result.kv.items()
    }
    assert abs(loss_of(tiny, result, FakeQuantization(result.activations, result.online, wrong)) / right - 1) > 1e-3


def test_learning_keeps_static_scales(tiny_model, run):
    result = run(tiny_model("llama"), scheme="w4a4kv4", transform="bdq", kv_scales="static")
    assert result.learned is not None
    assert all(isinstance(cache, StaticKVQuantization) for cache in result.kv.values())
