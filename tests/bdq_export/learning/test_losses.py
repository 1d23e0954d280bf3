"""Losses against their formulas in float64, and the end of the model against autograd over whole logits."""

from __future__ import annotations

import pytest
import torch

from bdq_export.learning import heads as heads_module
from bdq_export.learning.heads import Heads
from bdq_export.learning.losses import Loss

GENERATOR = torch.Generator().manual_seed(3)
LOGITS = torch.randn(6, 11, generator=GENERATOR)
TEACHER = torch.randn(6, 11, generator=GENERATOR)
LABELS = torch.tensor([1, 2, 3, 4, 5, -1])


def distributions(kind: str, target: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    p = LOGITS.double().softmax(-1)
    if kind == "ce" or target == "label":
        return p[:5], torch.nn.functional.one_hot(LABELS[:5], 11).double(), torch.tensor(5)
    return p, TEACHER.double().softmax(-1), torch.tensor(6)


def test_kl_is_zero_at_the_teacher_only():
    assert float(Loss()(TEACHER, TEACHER, LABELS)) == pytest.approx(0.0, abs=1e-5)
    p, q, _ = distributions("kl", "teacher")
    assert float(Loss()(LOGITS, TEACHER, LABELS)) == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-5)


@pytest.mark.parametrize("target", ["teacher", "label"])
@pytest.mark.parametrize("kind", ["ce", "rce", "rce-printed"])
@pytest.mark.parametrize("delta", [0.25, 0.5, 1.0])
def test_reverse_losses_are_their_formulas(kind, target, delta):
    p, q, _ = distributions(kind, target)
    expected = -(q * p.log()).sum()
    reverse = (p * (delta * p + (1 - delta) * q).log()).sum()
    expected = expected + {"ce": 0.0, "rce": -reverse, "rce-printed": reverse}[kind]
    found = Loss(kind, delta, target)(LOGITS, TEACHER, LABELS)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("target", ["teacher", "label"])
@pytest.mark.parametrize("kind", ["kl", "ce", "rce", "rce-printed"])
@pytest.mark.parametrize("delta", [0.0, 0.5, 1.0])
def test_gradients_are_finite_where_probabilities_vanish(kind, target, delta):
    """Both p and q are 0 in float32 at the first token of every row, and q alone at the second."""
    logits, teacher = LOGITS.clone(), TEACHER.clone()
    logits[:, 0], teacher[:, :2] = -300.0, -300.0
    logits.requires_grad_()
    found = Loss(kind, delta, target)(logits, teacher, LABELS)
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


def test_the_printed_sign_rewards_leaving_the_target():
    """Equation 21 as printed is CE - H(p) - KL(p ‖ m) with m = δp + (1-δ)q."""
    p, q, _ = distributions("rce-printed", "teacher")
    m = 0.5 * p + 0.5 * q
    cross, entropy, divergence = -(q * p.log()).sum(), -(p * p.log()).sum(), (p * (p / m).log()).sum()
    found = Loss("rce-printed")(LOGITS, TEACHER, LABELS)
    assert float(found) == pytest.approx(float(cross - entropy - divergence), rel=1e-5)


@pytest.mark.parametrize("loss", [Loss(), Loss("ce"), Loss("rce", 0.5, "label"), Loss("rce-printed")])
def test_gradients_of_few_rows_at_a_time_are_those_of_all(loss, monkeypatch):
    monkeypatch.setattr(heads_module, "_ROWS", 4)
    generator = torch.Generator().manual_seed(4)
    student, teacher = torch.randn(11, 8, generator=generator), torch.randn(11, 8, generator=generator)
    hidden = torch.randn(6, 8, generator=generator, requires_grad=True)
    states = torch.randn(6, 8, generator=generator)
    found = Heads(student, teacher).loss(loss, hidden, states, LABELS)
    (gradient,) = torch.autograd.grad(found, hidden)
    expected = loss(hidden @ student.t(), states @ teacher.t(), LABELS) / 6
    (direct,) = torch.autograd.grad(expected, hidden)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(gradient, direct, atol=1e-6)
