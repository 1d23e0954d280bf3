"""The closed forms are the minima they claim to be."""

from __future__ import annotations

import pytest
import torch

from bdq_export.transform import input_diagonal, smooth_diagonal


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [512, 24] and a weight [40, 24] with uneven channels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 24, generator=generator).double()
    weight = torch.randn(40, 24, generator=generator).double()
    return (
        x * torch.randn(24, generator=generator).double().exp(),
        weight * torch.randn(24, generator=generator).double().exp(),
    )


def objective(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> float:
    return ((x * scale).square().sum() * (weight / scale).square().sum()).item()


def test_input_diagonal_is_the_minimum():
    x, weight = problem()
    best = input_diagonal(weight.square().sum(0), x.square().mean(0))
    least = objective(x, weight, best)
    assert least < 0.7 * objective(x, weight, torch.ones(24))
    assert best.log().mean().item() == pytest.approx(0, abs=1e-12)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 0.01, 0.3):
        for _ in range(20):
            moved = best * (size * torch.randn(24, generator=generator).double()).exp()
            assert objective(x, weight, moved) > least
    # A uniform factor is the only freedom left.
    assert objective(x, weight, 3 * best) == pytest.approx(least, rel=1e-12)
    exponent = input_diagonal(weight.square().sum(0), x.square().mean(0)) ** 1.05
    assert objective(x, weight, exponent) > least


def test_common_factors_do_not_matter():
    x, weight = problem()
    w2, x2 = weight.square().sum(0), x.square().mean(0)
    torch.testing.assert_close(input_diagonal(w2 * 9, x2 * 1e-6), input_diagonal(w2, x2), rtol=1e-12, atol=0)


def test_dead_channels_keep_one():
    scale = input_diagonal(torch.tensor([16.0, 0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 16.0]))
    torch.testing.assert_close(scale, torch.tensor([2.0, 1.0, 1.0, 0.5]).double())
    assert torch.equal(input_diagonal(torch.zeros(3), torch.ones(3)), torch.ones(3).double())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, 1.0])
def test_smooth_diagonal(alpha):
    """SmoothQuant divides activations by s = max|x|^α / max|w|^(1-α): λ is 1/s up to a factor."""
    x, weight = problem()
    scale = smooth_diagonal(weight.abs().amax(0), x.abs().amax(0), alpha)
    smoothquant = x.abs().amax(0) ** alpha / weight.abs().amax(0) ** (1 - alpha)
    ratio = scale * smoothquant
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-10, atol=0)
    assert scale.log().mean().item() == pytest.approx(0, abs=1e-12)


def test_smooth_half_balances_the_two_sides():
    x, weight = problem()
    scale = smooth_diagonal(weight.abs().amax(0), x.abs().amax(0))
    ratio = (x * scale).abs().amax(0) / (weight / scale).abs().amax(0)
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("weight", "activation", "message"),
    [
        (torch.ones(3), torch.ones(4), "expected two equal"),
        (torch.ones(0), torch.ones(0), "expected two equal"),
        (torch.ones(2, 2), torch.ones(2, 2), "expected two equal"),
        (torch.tensor([1.0, -1]), torch.ones(2), "weight statistics range from -1"),
        (torch.ones(2), torch.tensor([1.0, torch.nan]), "activation statistics"),
        (torch.ones(2), torch.tensor([1.0, torch.inf]), "activation statistics"),
    ],
)
def test_bad_statistics(weight, activation, message):
    with pytest.raises(ValueError, match=message):
        input_diagonal(weight, activation)


def test_bad_alpha():
    with pytest.raises(ValueError, match=r"alpha is 1\.5, expected 0 to 1"):
        smooth_diagonal(torch.ones(2), torch.ones(2), 1.5)
