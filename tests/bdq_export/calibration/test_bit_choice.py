"""Bits of each site: within the target, the same for the same seed, and better spent than evenly."""

from __future__ import annotations

import numpy as np
import pytest
from calibrations import calibrate_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_model):
    """Calibrate a tiny model: `run(tiny, **options) -> CalibrationResult`."""
    directory = write_model(tmp_path_factory.mktemp("calibrate") / "model")  # for its tokenizer
    return lambda tiny, **options: calibrate_tiny(tiny, directory, **options)


def average(tiny, result):
    sizes = {path: tiny.weights[f"{path}.weight"].numel() for path in linears(tiny)}
    bits = {path: result.quantized[f"{path}.weight"].spec.bits for path in sizes}
    return sum(sizes[path] * bits[path] for path in sizes) / sum(sizes.values())


def linears(tiny):
    return [tiny.architecture.layer_path(layer, path) for layer in range(3) for path in tiny.architecture.linears]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
@pytest.mark.parametrize(
    ("scheme", "transform", "target"),
    [("w4a16", "none", 4.25), ("w4a16", "bdq", 2.9), ("w4a4kv4", "bdq", 3.3)],
)
def test_the_average_is_the_target_or_just_below(family, scheme, transform, target, tiny_model, run):
    tiny = tiny_model(family)
    result = run(tiny, scheme=scheme, transform=transform, weights="rtn", target_bits=target)
    assert result.bits.average == pytest.approx(average(tiny, result))
    assert target - 0.3 < result.bits.average <= target
    assert len({site.bits for site in result.bits.sites}) > 1
    for site in result.bits.sites:
        assert {result.quantized[f"{path}.weight"].spec.bits for path in site.modules} == {site.bits}
        assert site.losses[8] < site.losses[2]


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
def test_the_same_seed_gives_the_same_bytes(weights, tiny_model, run):
    tiny = tiny_model("llama")
    first, second = (run(tiny, scheme="w4a16", weights=weights, target_bits=3.5, seed=3) for _ in range(2))
    assert first.bits == second.bits
    for name, weight in first.quantized.items():
        assert np.array_equal(weight.codes, second.quantized[name].codes)


def test_no_more_is_predicted_to_be_lost_than_at_uniform_bits(tiny_model, run):
    result = run(tiny_model("llama"), scheme="w4a16", transform="none", weights="rtn", target_bits=4.0)
    uniform = sum(site.losses[4] for site in result.bits.sites)
    assert 0 < result.bits.predicted_loss <= uniform


def test_the_prediction_is_near_what_is_lost(tiny_model, run):
    options = {"scheme": "w4a16", "transform": "none", "weights": "rtn", "target_bits": 8.0, "calib_samples": 64}
    result = run(tiny_model("llama"), **options)
    assert result.bits.average == 8
    # Half to double: few tokens, and an 8-bit lm_head loses as well.
    assert 0.5 * result.bits.predicted_loss < result.loss < 2 * result.bits.predicted_loss


def test_kept_modules_keep_their_bits_and_count(tiny_model, run):
    tiny = tiny_model("llama")
    keep = ("*.layers.0.mlp.*=8", "*.layers.2.self_attn.q_proj=2")
    result = run(tiny, scheme="w4a16", transform="none", weights="rtn", target_bits=4.5, keep=keep)
    assert average(tiny, result) <= 4.5
    assert result.bits.kept == {
        "model.layers.0.mlp.gate_proj": 8,
        "model.layers.0.mlp.up_proj": 8,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.2.self_attn.q_proj": 2,
    }
    for path, bits in result.bits.kept.items():
        assert result.quantized[f"{path}.weight"].spec.bits == bits


def test_without_a_target_nothing_is_chosen(tiny_model, run):
    assert run(tiny_model("llama"), scheme="w4a16", transform="none", weights="gptq").bits is None
