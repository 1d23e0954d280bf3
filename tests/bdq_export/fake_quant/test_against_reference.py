"""The torch functions give the NumPy reference's numbers, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdq_export.fake_quant import (
    apply_online,
    fake_quantize_tokens,
    largest_size,
    online_hadamard,
    quantize_rows,
    quantize_tokens,
)
from bdq_export.fake_quant.kv_rows import decode_scales, encode_scales
from bdq_export.fake_quant.rounding import straight_through
from bdq_runtime.reference.activations import dynamic_fake_quantize, quantize_activations
from bdq_runtime.reference.cache_rows import (
    decode_scale,
    dequantize_cache_rows,
    encode_scale,
    quantize_cache_rows,
    quantize_row_codes,
)
from bdq_runtime.reference.hadamard import hadamard
from bdq_runtime.specs import OnlineTransform

BITS = st.sampled_from([3, 4, 8])
CLIPS = st.floats(0.3, 1.0)
SEEDS = st.integers(0, 2**32 - 1)


def rows(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Rows of very different sizes, with outliers, and one of zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(2, size=shape) * np.exp(rng.normal(scale=8, size=(*shape[:-1], 1)))
    values.reshape(-1, shape[-1])[0] = 0
    return values.astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, bits=BITS, clip=CLIPS, columns=st.sampled_from([1, 16, 144, 576]))
def test_activations(seed, bits, clip, columns):
    x = rows(seed, (7, columns))
    codes, scales = quantize_tokens(torch.from_numpy(x), bits, clip)
    wanted, steps = quantize_activations(x, bits, clip)
    assert np.array_equal(codes.numpy(), wanted)
    assert np.array_equal(scales.numpy().reshape(-1), steps.reshape(-1))
    assert np.array_equal(
        fake_quantize_tokens(torch.from_numpy(x), bits, clip).numpy(), dynamic_fake_quantize(x, bits, clip)
    )


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, size=st.sampled_from([1, 2, 16, 64, 128, 512, 2048, 4096]), blocks=st.integers(1, 3))
def test_hadamard(seed, size, blocks):
    x = rows(seed, (3, size * blocks))
    assert np.array_equal(online_hadamard(torch.from_numpy(x), size).numpy(), hadamard(x, size))


def test_online_diagonal_comes_after_the_hadamard():
    x = rows(1, (4, 96))
    diagonal = np.linspace(0.5, 2, 96, dtype=np.float32)
    got = apply_online(torch.from_numpy(x), OnlineTransform(32, diagonal))
    assert np.array_equal(got.numpy(), hadamard(x, 32) * diagonal)


def test_channels_take_turns_before_the_hadamard():
    x = rows(1, (4, 96))
    got = apply_online(torch.from_numpy(x), OnlineTransform(32, interleave=3))
    assert np.array_equal(got.numpy(), hadamard(np.stack(np.split(x, 3, axis=-1), -1).reshape(4, 96), 32))


@pytest.mark.parametrize(("channels", "size"), [(1536, 512), (64, 64), (9, 1), (16384, 4096), (8192 * 3, 4096)])
def test_largest_size(channels, size):
    assert largest_size(channels) == size


@pytest.mark.parametrize("size", [3, 0, 8192, 64])
def test_hadamard_sizes_that_do_not_fit(size):
    with pytest.raises(ValueError, match="power of two"):
        online_hadamard(torch.ones(2, 96), size)


@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, bits=BITS, clip=CLIPS, size=st.sampled_from([8, 16, 64, 128]), shift=st.floats(-5, 5))
def test_cache_rows(seed, bits, clip, size, shift):
    x = rows(seed, (2, 3, size))
    x = (x + np.float32(shift) * np.abs(x).max(-1, keepdims=True)).astype(np.float32)
    found = quantize_rows(torch.from_numpy(x), bits, clip)
    codes, scale_codes, zeros = quantize_row_codes(x, bits, clip)
    assert np.array_equal(found.codes.numpy(), codes)
    assert np.array_equal(found.zeros.numpy().reshape(-1), zeros.reshape(-1))
    assert np.array_equal(encode_scales(found.scales).numpy().reshape(-1), scale_codes.reshape(-1))
    stored = dequantize_cache_rows(quantize_cache_rows(x, bits, clip), size, bits)
    assert np.array_equal(found.values().numpy(), stored)


@settings(max_examples=200, deadline=None)
@given(st.floats(2.0**-32, 2.0**127, width=32))
def test_scale_codes(value):
    ours = encode_scales(torch.tensor([value]))
    assert np.array_equal(ours.numpy(), encode_scale(np.array([value], np.float32)))
    assert np.array_equal(decode_scales(ours).numpy(), decode_scale(ours.numpy()))


def test_straight_through_has_the_same_values_and_passes_gradients():
    x = torch.from_numpy(rows(3, (4, 32)))[1:].requires_grad_()
    clip = torch.tensor(0.7, requires_grad=True)
    ours = fake_quantize_tokens(x, 4, clip, straight_through)
    torch.testing.assert_close(ours, fake_quantize_tokens(x.detach(), 4, 0.7), rtol=1e-5, atol=0)
    ours.square().mean().backward()
    assert float(clip.grad.abs()) > 0
    assert float(x.grad.abs().sum()) > 0
