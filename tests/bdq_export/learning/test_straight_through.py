"""Values are those of `fake_quant`; gradients are those of a rounding that moves with its input and its grid."""

from __future__ import annotations

import pytest
import torch

from bdq_export.fake_quant import fake_quantize_rows, fake_quantize_tokens, online_hadamard
from bdq_export.fake_quant.kv_channels import fake_quantize_channels
from bdq_export.fake_quant.rounding import straight_through
from bdq_export.learning.straight_through import channel_values, rotate, row_values, token_codes, token_values


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_values_are_those_of_the_fake_quantizers(bits, clip):
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(bits))
    codes, steps = token_codes(x, torch.tensor(clip), bits, torch.bfloat16)
    assert torch.equal(codes.float() * steps, fake_quantize_tokens(x, bits, clip))
    assert torch.equal(row_values(x, torch.tensor(clip), bits), fake_quantize_rows(x, bits, clip))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_token_values_have_the_gradient_of_the_plain_formula(bits, clip):
    generator = torch.Generator().manual_seed(bits)
    x, weight = torch.randn(2, 7, 32, generator=generator)
    gradients = []
    for quantize in (token_values, lambda x, bits, clip: fake_quantize_tokens(x, bits, clip, straight_through)):
        leaf = x.clone().requires_grad_()
        values = quantize(leaf, bits, clip)
        assert torch.equal(values.detach(), fake_quantize_tokens(x, bits, clip))
        (values * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_rotation_is_the_online_one():
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(rotate(x, 32), online_hadamard(x, 32), atol=2e-5)


def test_a_clip_moves_what_it_cuts_off_and_leaves_the_inside_to_rounding():
    """One value beyond the grid: it is worth 7 steps, and steps are proportional to the clip."""
    x = torch.tensor([[1.0, 0.0]])
    clip = torch.tensor(0.5, requires_grad=True)
    codes, steps = token_codes(x, clip, 4, torch.float32)
    (codes * steps).sum().backward()
    assert codes[0, 0] == 7
    assert clip.grad is not None
    assert float(clip.grad) == pytest.approx(1.0)  # d(7 clip / 7) / d clip


def test_gradients_pass_inside_of_the_grid_only():
    x = torch.tensor([[1.0, 0.3, -0.2]], requires_grad=True)
    codes, steps = token_codes(x, torch.tensor(0.5), 4, torch.float32)
    (codes * steps.detach()).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, pytest.approx(1.0), pytest.approx(1.0)]]


@pytest.mark.parametrize("bits", [4, 8])
def test_static_channels_pass_gradients_inside_of_their_grid(bits):
    top = 1 << (bits - 1)
    x = torch.tensor([[[0.0, 0.3, 1.2], [-top - 1.0, 0.6 - top, top]]], requires_grad=True)
    steps = torch.tensor([[[1.0, 0.5, 1.0]]])
    values = channel_values(x, steps, bits)
    assert torch.equal(values.detach(), fake_quantize_channels(x.detach(), steps, bits))
    (3 * values).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[[3.0, 3.0, 3.0], [0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("bits", [3, 4])
def test_row_clips_have_the_gradient_of_the_mean_value(bits):
    """Against differences over many rows, where roundings average out: the ends of the grid move with the clip."""
    x = torch.randn(20000, 16, generator=torch.Generator().manual_seed(2))
    clip = torch.tensor(0.7, requires_grad=True)

    def error(value: torch.Tensor) -> torch.Tensor:
        return (row_values(x, value, bits) - x).square().mean()

    error(clip).backward()
    step = 0.02
    with torch.no_grad():
        expected = (error(torch.tensor(0.7 + step)) - error(torch.tensor(0.7 - step))) / (2 * step)
    assert clip.grad is not None
    assert float(clip.grad) == pytest.approx(float(expected), rel=0.15)
