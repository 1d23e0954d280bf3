"""Curvature is the second moment of gradients, in groups and by parts of the tokens, and tokens have weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdq_export.calibration import output_curvature as module
from bdq_export.calibration import precision, statistics
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.output_curvature import output_curvature
from bdq_export.calibration.output_gradients import label_seeds, site_gradients
from bdq_export.calibration.statistics import InputObserver, shrunk
from bdq_export.float_model import load_float_model
from bdq_export.progress import QuietProgress
from bdq_export.quantize.gptq import output_factor
from bdq_export.scratch import Scratch, is_mapped

TOKENS = torch.randint(0, 320, (6, 40), generator=torch.Generator().manual_seed(1))
SEEDS = label_seeds(5, len(TOKENS))


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(module, "GROUP", 24)


def measured(tiny, model, scratch=None, batch_tokens=4096):
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS, batch_tokens=batch_tokens)
    return output_curvature(runner, tiny.architecture, tiny.dimensions, {}, SEEDS, QuietProgress(), scratch)


def test_factors_are_those_of_the_second_moments_of_gradients_by_groups(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    found = measured(tiny, model)
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS)
    seen = 0
    for (sites,) in site_gradients(runner, tiny.architecture, tiny.dimensions, {}, SEEDS):
        for site in sites:
            for path, gradients in site.gradients.items():
                groups = found.factors(path)
                assert sum(map(len, groups)) == gradients.shape[1]
                first, second = gradients.tensor_split(2)
                for start, group in enumerate(groups):
                    columns = slice(24 * start, 24 * (start + 1))
                    moments = shrunk(*(half[:, columns].T @ half[:, columns] for half in (first, second)))
                    torch.testing.assert_close(
                        group.double(), output_factor(moments, TOKENS.numel()), rtol=2e-3, atol=2e-3
                    )
                    assert not torch.allclose(
                        group.double() * 1.01, output_factor(moments, TOKENS.numel()), rtol=2e-3, atol=2e-3
                    )
                    seen += 1
    assert seen > 3 * 7


def test_a_factor_belongs_to_the_damped_matrix():
    values = torch.randn(50, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    curvature = values.T @ values / 50
    factor = output_factor(curvature, 1000)
    damped = curvature + 0.02 * curvature.diagonal().mean() * torch.eye(9)
    assert torch.equal(factor.diagonal(), torch.ones(9, dtype=torch.float64))
    assert torch.equal(factor, factor.triu())
    scales = factor @ damped @ factor.T  # D⁻¹ where G⁻¹ = Uᵀ D U
    torch.testing.assert_close(scales, torch.diag(scales.diagonal()), rtol=0, atol=1e-9)


def test_tokens_count_by_the_root_of_their_gradients(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    found = measured(tiny, model)
    runner = BlockRunner(model, tiny.architecture.layers, TOKENS)
    for (sites,) in site_gradients(runner, tiny.architecture, tiny.dimensions, {}, SEEDS):
        for site in sites:
            if len(site.gradients) > 1:
                continue
            weights = found.weights[site.site.module]
            assert weights.shape == (TOKENS.numel(),)
            assert float(weights.mean()) == pytest.approx(1.0, abs=1e-5)
            (gradients,) = site.gradients.values()
            free = weights < 0.99 * weights.max()
            ratio = weights[free] / gradients.norm(dim=1)[free]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=0)


def test_batch_by_batch_every_token_counts_as_ever(tiny_model, monkeypatch):
    # Batches have other halves, which correlations would be shrunk by.
    monkeypatch.setattr(statistics, "shrunk", torch.add)
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    one, many = measured(tiny, model), measured(tiny, model, batch_tokens=TOKENS.shape[1])
    for path, weights in one.weights.items():
        torch.testing.assert_close(weights, many.weights[path], rtol=1e-3, atol=1e-4)
    for path in one.measured:
        for group, other in zip(one.factors(path), many.factors(path), strict=True):
            torch.testing.assert_close(group, other, rtol=1e-2, atol=2e-3)


def test_sums_on_disk_are_the_same(tiny_model, tmp_path):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    scratch = Scratch(tmp_path)
    arrays = []
    keep = scratch.keep
    scratch.keep = lambda array: arrays.append(keep(array)) or arrays[-1]
    held, kept = measured(tiny, model), measured(tiny, model, scratch)
    assert all(map(is_mapped, arrays))
    # The inputs of each block, and the factors.
    assert len(arrays) == tiny.dimensions.layers + sum(map(len, kept.measured.values()))
    for path, factors in held.measured.items():
        assert all(map(torch.equal, factors, kept.measured[path]))


def test_a_weight_of_two_is_a_token_seen_twice():
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    twice = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 7, 7])
    weighted = InputObserver(hessians=True, weights=torch.bincount(twice).float())
    repeated = InputObserver(hessians=True)
    weighted("x", inputs)
    repeated("x", inputs[twice])
    one, two = weighted.statistics("x"), repeated.statistics("x")
    torch.testing.assert_close(one.hessian * 8, two.hessian * 10, rtol=1e-5, atol=1e-5)
    # Energies are the inputs' own.
    assert np.isclose(float(one.energy.sum()), float(inputs.double().square().sum() / 8))


def test_weights_go_on_from_batch_to_batch():
    inputs, weights = torch.randn(10, 4, generator=torch.Generator().manual_seed(2)), torch.rand(10) + 0.5
    observer = InputObserver(hessians=True, weights=weights)
    observer("x", inputs[:4])
    observer("x", inputs[4:])
    torch.testing.assert_close(
        observer.statistics("x").hessian.diagonal(), (inputs.square() * weights[:, None]).mean(0)
    )


def test_few_tokens_are_damped_more():
    """Four tokens say nothing of nine outputs but that they are coupled by chance."""
    values = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    few, many = (output_factor(values.T @ values, tokens) - torch.eye(9) for tokens in (4, 4000))
    assert float(few.norm()) < 0.5 * float(many.norm())
