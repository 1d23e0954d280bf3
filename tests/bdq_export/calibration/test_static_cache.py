"""Static scales of a cache: each channel has the one of least squared error, of what the model caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdq_export.calibration.dynamic import DynamicBits
from bdq_export.calibration.sandwich import sandwich
from bdq_export.calibration.static_cache import RATIOS, channel_scales, observe_heads
from bdq_export.calibration.workspace import Workspace
from bdq_export.fake_quant import attach
from bdq_export.fake_quant.kv_channels import fake_quantize_channels
from bdq_export.float_model import load_float_model
from bdq_export.progress import QuietProgress
from bdq_runtime.specs import StaticKVQuantization


@pytest.fixture
def space(tiny_model):
    """The workspace of a tiny model whose cache has 4 bits and static scales."""
    tiny = tiny_model("qwen3")
    model = load_float_model(tiny, tiny.weights)
    tokens = torch.randint(0, tiny.dimensions.vocab_size, (6, 32), generator=torch.Generator().manual_seed(2))
    found = Workspace(
        tiny,
        model,
        tiny.architecture,
        tiny.dimensions,
        tiny.weights,
        tokens,
        lambda path: None,
        QuietProgress(),
        dynamic=DynamicBits(4, 4, static_cache=True),
    )
    detach = attach(model, tiny.architecture, tiny.dimensions, found.quantization.view)
    yield found
    detach()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_other_ratio_loses_less(bits) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 500, 8, generator=random) * torch.logspace(-3, 3, 8)
    top = (1 << (bits - 1)) - 1

    def error(scales) -> torch.Tensor:
        return (fake_quantize_channels(x, scales[:, None], bits) - x).double().square().sum(1)

    scales = channel_scales(x, bits)
    best = error(scales)
    for ratio in RATIOS:
        assert (best <= error(x.abs().amax(1) * (ratio / top)) * (1 + 1e-6)).all()
    whole = channel_scales(x, bits, search=False)
    torch.testing.assert_close(whole, x.abs().amax(1) / top)
    assert (scales <= whole).all()
    if bits == 4:
        assert (best < error(whole)).float().mean() > 0.8, "a normal distribution is clipped where steps are coarse"


def test_a_channel_that_is_always_zero_stays_zero() -> None:
    x = torch.randn(1, 20, 2)
    x[..., 1] = 0
    scales = channel_scales(x, 4)
    assert (scales > 0).all()
    assert (fake_quantize_channels(x, scales[:, None], 4)[..., 1] == 0).all()


def test_what_is_observed_is_what_the_model_caches(space) -> None:
    with torch.inference_mode():
        cache = space.model(space.tokens, use_cache=True).past_key_values
    runner = space.runner()
    hidden = runner.embedded()
    for layer in range(space.dimensions.layers):
        heads, hidden = observe_heads(runner, layer, hidden)
        keys, values = (each[0].transpose(0, 1).flatten(1, 2) for each in zip(*_cached(cache, layer), strict=True))
        for found, expected in ((heads.key, keys), (heads.value, values)):
            assert found.shape == (space.dimensions.kv_heads, 6 * 32, space.dimensions.head_dim)
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def _cached(cache, layer):
    return [(cache.layers[layer].keys, cache.layers[layer].values)]


def test_candidates_are_compared_with_a_static_cache(space) -> None:
    space.quantize_inputs(space.dynamic, rotate_heads=True)
    caches = space.quantization.kv
    assert sorted(caches) == list(range(space.dimensions.layers))
    assert all(isinstance(cache, StaticKVQuantization) and cache.bits == 4 for cache in caches.values())
    assert not np.array_equal(caches[0].key_scales, caches[1].key_scales)


def test_nothing_is_done_to_heads_that_scales_undo(space) -> None:
    statistics = space.statistics()
    edge = next(edge.name for edge in space.architecture.edges if edge.name == "key_query")
    for name in ("bdq", "bdq-online"):
        assert not [key for key in sandwich(space, name, statistics, 0).diagonals if key[1] == edge]
    assert not space.rotated_cache(True)
