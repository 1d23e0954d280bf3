"""Calibration of tiny models of every family, with all transforms and weight methods."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bdq_export import calibrate as module
from bdq_export.calibrate import calibrate
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.ranges import merge_ranges
from bdq_export.calibration.selection import Measured, choose, names_to_try
from bdq_export.calibration.static_activations import fake_quantize
from bdq_export.errors import UsageError
from bdq_export.float_model import load_float_model
from bdq_export.options import KRONECKER, PARTIAL, ExportOptions
from bdq_export.progress import QuietProgress
from bdq_export.quantize.sequential import set_quantized
from bdq_export.transform import fold

FAMILIES = ("llama", "llama_biases", "qwen2", "qwen3", "phi3", "gemma3")
SMALL = {"calib_samples": 16, "calib_seq_len": 32, "block_size": 16}
ROUNDED = {"transform": "none", "weights": "rtn", "calib_samples": None, "calib_seq_len": None}


class Described:
    directory: Path

    def __init__(self, tiny) -> None:
        self.config, self.architecture, self.dimensions = tiny.config, tiny.architecture, tiny.dimensions


@pytest.fixture(scope="module", autouse=True)
def tokenizer_folder(tmp_path_factory, write_model):
    """Calibration text starts as the tokenizer says."""
    Described.directory = write_model(tmp_path_factory.mktemp("calibrate") / "model")


def run(tiny, **options):
    model = load_float_model(tiny, tiny.weights)
    described = Described(tiny)
    return model, calibrate(described, model, tiny.weights, ExportOptions(**{**SMALL, **options}), QuietProgress())


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def loss_of(tiny, result):
    """Held-out loss of a result, measured from scratch."""
    model = load_float_model(tiny, tiny.weights)
    loss = HeldOutLoss(model, tiny.architecture.layers, result.held_back)
    untied = load_float_model(tiny, result.weights)
    set_quantized(untied, tiny.architecture, result.quantized)
    loss._runner.model = untied
    loss._runner.blocks = list(untied.get_submodule(tiny.architecture.layers).children())
    return loss()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("transform", ["none", "auto"])
def test_every_family_is_quantized_whole(family, transform, tiny_model):
    tiny = tiny_model(family)
    # So few sequences that the one held out both chooses and is held back.
    model, result = run(tiny, transform=transform, calib_samples=7)
    tied = tiny.dimensions.tied and "lm_head.weight" not in result.weights
    linears = {
        f"{tiny.architecture.layer_path(i, path)}.weight" for i in range(3) for path in tiny.architecture.linears
    }
    assert set(result.quantized) == linears | {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name, weight in result.quantized.items():
        assert weight.codes.shape == tuple(result.weights[name].shape)
        assert weight.spec.bits == (4 if name in linears else 8)
    assert result.loss is not None
    assert result.loss == pytest.approx(loss_of(tiny, result), rel=1e-3)
    # The model is float again.
    torch.testing.assert_close(
        logits(model, result.held_back), logits(load_float_model(tiny, tiny.weights), result.held_back)
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("transform", ["smooth", "hadamard", "bdq"])
def test_transforms_keep_the_float_model(family, transform, tiny_model):
    tiny = tiny_model(family)
    _, result = run(tiny, transform=transform, weights="rtn")
    assert result.transforms.diagonals or result.transforms.head_rotations
    # Gemma 3 has no residual rotation: hadamard is less there, and says so.
    assert bool(result.warnings) == (transform == "hadamard" and family == "gemma3"), result.warnings
    folded = fold(tiny.architecture, tiny.dimensions, tiny.weights, result.transforms)
    assert all(torch.equal(folded[name], result.weights[name]) for name in folded)
    expected = logits(load_float_model(tiny, tiny.weights), result.held_back)
    actual = logits(load_float_model(tiny, result.weights), result.held_back)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert len(result.weight_flatness) == 4 * 3


def test_gptq_beats_rounding_and_a_wrong_scale_does_not(tiny_model):
    tiny = tiny_model("llama")
    _, careful = run(tiny, transform="none", calib_samples=48, calib_seq_len=64)
    _, rounded = run(tiny, **ROUNDED)
    good = loss_of(tiny, careful)
    assert good < 0.95 * loss_of(tiny, dataclasses.replace(rounded, held_back=careful.held_back))
    for weight in careful.quantized.values():
        weight.scales[:] *= np.float32(1.01)
    assert loss_of(tiny, careful) > good


def test_auto_is_never_worse_than_no_transform(tiny_model, monkeypatch):
    """Both rounded to nearest and with GPTQ, by the loss on held-out tokens."""
    final = {}
    real = module._Calibration._quantize

    def recorded(self, candidate, *stage, **more):
        found = real(self, candidate, *stage, **more)
        final[candidate.name] = found.loss
        return found

    monkeypatch.setattr(module._Calibration, "_quantize", recorded)
    for family in ("qwen2", "gemma3"):
        tiny = tiny_model(family)
        _, chosen = run(tiny, weights="rtn")
        losses = {candidate.name: candidate.loss for candidate in chosen.candidates}
        assert losses[chosen.transform] == min(losses.values())
        assert set(losses) == {"none", "smooth", "bdq"}
        final.clear()
        _, chosen = run(tiny)
        assert "none" in final
        assert final[chosen.transform] == min(final.values()) == chosen.loss
        assert sum(candidate.chosen for candidate in chosen.candidates) == 1


@pytest.mark.parametrize(
    "options", [{}, {"scheme": "w4a8kv8", "ops": "bdq", "block_size": 32}], ids=["w4a16", "w4a8kv8"]
)
def test_auto_goes_back_when_the_final_weights_are_worse(options, tiny_model, monkeypatch):
    """A candidate that only looks good rounded to nearest is not shipped, nor is anything of it."""
    tiny = tiny_model("qwen2")
    _, plain = run(tiny, transform="none", **options)
    monkeypatch.setattr(module, "choose", lambda measured, tied: ("smooth", "made up"))
    real = module._Calibration._quantize
    penalty = {"smooth": 100.0, "none": 0.0}

    def penalized(self, candidate, *stage, **more):
        found = real(self, candidate, *stage, **more)
        return replace(found, loss=found.loss + penalty[candidate.name])

    monkeypatch.setattr(module._Calibration, "_quantize", penalized)
    _, result = run(tiny, **options)
    assert result.transform == "none"
    assert "not with GPTQ" in result.reason
    assert (result.activations, result.kv, result.online) == (plain.activations, plain.kv, {})
    assert bool(result.activations) == bool(options)
    assert not result.transforms.diagonals
    assert result.activation_flatness == plain.activation_flatness
    for name, weight in plain.quantized.items():
        assert weight.codes.tobytes() == result.quantized[name].codes.tobytes()


@pytest.mark.slow  # learned schemes have such a test, too
def test_the_same_seed_gives_the_same_bytes(tiny_model):
    tiny = tiny_model("llama")
    results = [run(tiny)[1] for _ in range(2)]
    other = run(tiny, seed=1)[1]
    for name, weight in results[0].quantized.items():
        again = results[1].quantized[name]
        assert weight.codes.tobytes() == again.codes.tobytes()
        assert weight.scales.tobytes() == again.scales.tobytes()
    assert not torch.equal(results[0].held_back, other.held_back)


def test_rounding_without_transform_runs_no_calibration(tiny_model, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("a calibration forward was run")

    monkeypatch.setattr("bdq_export.calibration.blocks.BlockRunner.run", forbidden)
    monkeypatch.setattr("bdq_export.calibration.blocks.BlockRunner.embedded", forbidden)
    _, result = run(tiny_model("llama"), **ROUNDED)
    assert result.loss is None
    assert result.held_back.shape[0] >= 2


def test_keep_changes_bits(tiny_model):
    keep = ("model.layers.0.*=16", "*.down_proj=8", "lm_head=4")
    _, result = run(tiny_model("qwen3"), transform="none", keep=keep, symmetric=False)
    assert "model.layers.0.self_attn.q_proj.weight" not in result.quantized
    assert result.quantized["model.layers.0.mlp.down_proj.weight"].spec.bits == 8
    assert result.quantized["model.layers.1.self_attn.q_proj.weight"].spec.bits == 4
    assert result.quantized["lm_head.weight"].spec.bits == 4
    assert result.quantized["model.embed_tokens.weight"].spec.bits == 8


def test_tied_ends_take_one_width(tiny_model):
    tiny = tiny_model("llama")
    _, result = run(tiny, keep=("lm_head=4",), **ROUNDED)
    assert result.quantized["model.embed_tokens.weight"].spec.bits == 4
    with pytest.raises(UsageError, match="share one weight"):
        run(tiny, keep=("lm_head=4", "model.embed_tokens=8"))


@pytest.mark.parametrize("family", ["llama_biases", "phi3"])
def test_static_activations_get_ranges_that_cover_the_model(family, tiny_model):
    tiny = tiny_model(family)
    _, result = run(tiny, scheme="w8a8", ops="qdq", transform="none", block_size=None)
    layers = [tiny.architecture.layer_path(i, path) for i in range(3) for path in tiny.architecture.linears]
    assert set(result.activation_ranges) == set(layers)
    assert all(low < high and out_low < out_high for low, high, out_low, out_high in result.activation_ranges.values())
    qkv = layers[:3]
    merged = merge_ranges(result.activation_ranges, {"qkv": qkv, "unknown": ["lm_head"]})
    assert set(merged) == {"qkv"}
    assert merged["qkv"][2] == min(result.activation_ranges[path][2] for path in qkv)
    assert len({result.activation_ranges[path][:2] for path in qkv}) == 1
    assert all(weight.spec.symmetric for weight in result.quantized.values())


def test_static_activations_are_part_of_the_loss(tiny_model):
    tiny = tiny_model("qwen2")
    _, weight_only = run(tiny, scheme="w8a8", transform="none", calib_samples=7)
    _, static = run(tiny, scheme="w8a8", ops="qlinear", transform="none", calib_samples=7, block_size=None)
    assert static.loss > 2 * weight_only.loss
    _, chosen = run(tiny, scheme="w8a8", ops="qlinear", calib_samples=7, block_size=None)
    assert {candidate.name for candidate in chosen.candidates} == {"none", "smooth", "bdq", "bdq-rotated"}


def test_fake_quantization_is_uint8_with_an_exact_zero():
    values = torch.linspace(-1, 3, 1000)
    rounded = fake_quantize(values, -1, 3)
    assert len(rounded.unique()) == 256
    assert 0 in rounded
    assert float((rounded - values).abs().max()) <= 4 / 255
    assert fake_quantize(torch.tensor([9.0, -9.0]), -1, 3).tolist() == pytest.approx([3.0, -1.0], abs=4 / 255)
    assert fake_quantize(torch.zeros(3), 0, 0).tolist() == [0, 0, 0]


def test_a_rotation_must_pay_for_untying():
    close = [Measured("none", 1.0), Measured("bdq", 0.9), Measured("bdq-rotated", 0.85)]
    assert choose(close, tied=True)[0] == "bdq"
    assert "not enough less" in choose(close, tied=True)[1]
    assert choose(close, tied=False)[0] == "bdq-rotated"
    assert choose([*close[:2], Measured("bdq-rotated", 0.5)], tied=True)[0] == "bdq-rotated"
    plain = ("none", "smooth", "bdq")
    assert names_to_try("auto", rotates=False) == plain
    assert names_to_try("auto", rotates=True) == (*plain, "bdq-rotated")
    assert names_to_try("auto", True, 8) == (*plain, "bdq-online")
    assert names_to_try("auto", True, 4) == ("none", "bdq-online")
    assert names_to_try("bdq", True, 3) == ("bdq-online",)
    assert names_to_try("hadamard", rotates=False) == ("hadamard",)
    assert names_to_try("spin", True, 4) == ("spin",)
    alone = ("bdq-plain", *PARTIAL, KRONECKER)
    assert [names_to_try(name, True, 4) for name in alone] == [(name,) for name in alone]
