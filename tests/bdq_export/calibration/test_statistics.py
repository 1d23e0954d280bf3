"""Shrinking: signal stays, chance goes, and GPTQ does better on other tokens."""

from __future__ import annotations

import torch

from bdq_export.calibration.statistics import shrunk
from bdq_export.quantize.gptq import GptqOptions, gptq, hessian_error
from bdq_runtime.packing import PerBlock, QuantSpec

COLUMNS = 96


def _inputs(tokens: int, seed: int, mixed: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(0)) * mixed + torch.eye(COLUMNS)
    return torch.randn(tokens, COLUMNS, generator=generator) @ mix


def _shrunk(rows: torch.Tensor) -> torch.Tensor:
    halves = [half.T @ half for half in rows.tensor_split(2)]
    return shrunk(*halves) / len(rows)


def test_chance_correlations_vanish_and_signal_stays() -> None:
    for mixed, tokens, low, high in ((0.0, 200, 0.0, 0.35), (0.2, 20000, 0.98, 1.0)):
        rows = _inputs(tokens, 1, mixed)
        plain, result = rows.T @ rows / tokens, _shrunk(rows)
        torch.testing.assert_close(result.diagonal(), plain.diagonal())
        share = result.fill_diagonal_(0).norm() / plain.fill_diagonal_(0).norm()
        assert low <= float(share) <= high + 1e-5


def test_a_shrunk_hessian_is_positive_semidefinite() -> None:
    rows = _inputs(40, 2, 0.1)
    assert float(torch.linalg.eigvalsh(_shrunk(rows).double())[0]) > -1e-5


def test_gptq_on_few_tokens_does_better_on_others() -> None:
    weight = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(5)) * 0.05
    few, others = _inputs(150, 3, 0.03), _inputs(20000, 4, 0.03)
    truth, spec, options = others.T @ others / len(others), QuantSpec(4, PerBlock(32)), GptqOptions(damping=0.01)
    plain = hessian_error(weight, gptq(weight, few.T @ few / len(few), spec, options).weight, truth)
    better = hessian_error(weight, gptq(weight, _shrunk(few), spec, options).weight, truth)
    assert better < 0.95 * plain


def test_dead_channels_stay_dead() -> None:
    rows = _inputs(100, 6, 0.1)
    rows[:, 3] = 0
    result = _shrunk(rows)
    assert torch.isfinite(result).all()
    assert not result[3].any()
