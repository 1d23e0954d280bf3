"""GPTQ: less output error than rounding, the same codes where columns are independent, fallbacks that are told."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from bdq_export.quantize.gptq import GptqOptions, gptq, hessian_error
from bdq_export.quantize.grid import searched_grid
from bdq_export.quantize.rtn import rtn
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec

COLUMNS = 96
SPECS = [
    QuantSpec(bits, granularity, symmetric)
    for bits in (2, 4, 8)
    for granularity in (PerBlock(32), PerChannel())
    for symmetric in (True, False)
]


def _weight(columns: int = COLUMNS) -> torch.Tensor:
    return torch.randn(40, columns, generator=torch.Generator().manual_seed(5)) * 0.05


def _hessian(columns: int = COLUMNS, tokens: int = 400) -> torch.Tensor:
    generator = torch.Generator().manual_seed(6)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ (mix * torch.rand(columns, generator=generator))
    return inputs.T @ inputs / tokens


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_gptq_has_less_output_error_than_rounding(spec: QuantSpec, sweeps: int) -> None:
    weight, hessian = _weight(), _hessian()
    done = gptq(weight, hessian, spec, GptqOptions(sweeps=sweeps))
    assert done.fallback is None
    error = hessian_error(weight, done.weight, hessian)
    rounded = hessian_error(weight, rtn(weight, spec, search=True, importance=hessian.diagonal()), hessian)
    assert error < 0.9 * rounded
    if spec.bits == 2:
        return  # so few codes that the scales are not close to a minimum for them
    broken = dataclasses.replace(done.weight, scales=done.weight.scales * np.float32(1.01))
    assert hessian_error(weight, broken, hessian) > error


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_independent_columns_are_rounded_to_nearest(spec: QuantSpec, act_order: bool) -> None:
    weight = _weight()
    done = gptq(weight, torch.eye(COLUMNS), spec, GptqOptions(sweeps=0, act_order=act_order))
    grid = searched_grid(weight, spec)
    rounded = grid.quantized(grid.codes(weight))
    assert np.array_equal(done.weight.codes, rounded.codes)
    assert np.array_equal(done.weight.scales, rounded.scales)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_refinement_never_raises_the_error(spec: QuantSpec) -> None:
    weight, hessian = _weight(), _hessian()
    errors = []
    for sweeps in range(4):
        quantized = gptq(weight, hessian, spec, GptqOptions(sweeps=sweeps, damping=1e-4)).weight
        errors.append(hessian_error(weight, quantized, hessian))
        assert np.array_equal(quantized.scales, quantized.scales.astype(np.float16).astype(np.float32))
        assert quantized.codes.max() < 1 << spec.bits
    assert all(after <= before * (1 + 1e-3) for before, after in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_the_order_of_columns_is_one_of_processing_only() -> None:
    """With one column far more energetic than the others, codes still belong to their own columns."""
    weight, hessian = _weight(), _hessian()
    hessian[70] *= 10
    hessian[:, 70] *= 10
    quantized = gptq(weight, hessian, QuantSpec(8, PerBlock(32))).weight
    error = quantized.dequantize() - weight.numpy()
    assert np.square(error).sum() < 1e-2 * np.square(weight.numpy()).sum()


@pytest.mark.parametrize("columns", [80, 33, 200])
def test_columns_need_not_fill_the_last_block(columns: int) -> None:
    weight, hessian, spec = _weight(columns), _hessian(columns, 800), QuantSpec(4, PerBlock(32), symmetric=False)
    quantized = gptq(weight, hessian, spec).weight
    assert quantized.scales.shape == (40, -(-columns // 32))
    assert hessian_error(weight, quantized, hessian) < hessian_error(weight, rtn(weight, spec), hessian)


def test_dead_columns_and_too_few_tokens_need_no_fallback() -> None:
    weight, hessian = _weight(), _hessian(tokens=20)
    hessian[10] = 0
    hessian[:, 10] = 0
    done = gptq(weight, hessian, QuantSpec(4, PerBlock(32)))
    assert done.fallback is None
    assert np.isfinite(done.weight.dequantize()).all()


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (torch.zeros(COLUMNS, COLUMNS), "all zeros"),
        (torch.full((COLUMNS, COLUMNS), float("nan")), "not finite"),
        (torch.eye(COLUMNS) - 2.0 * (1 - torch.eye(COLUMNS)), "not positive definite"),
    ],
)
def test_a_hessian_that_cannot_be_used_is_told(hessian: torch.Tensor, reason: str) -> None:
    weight, spec = _weight(), QuantSpec(4, PerBlock(32))
    done = gptq(weight, hessian, spec)
    assert done.fallback is not None
    assert reason in done.fallback
    assert done.damping is None
    if "definite" not in reason:
        assert np.array_equal(done.weight.codes, searched_grid(weight, spec).codes(weight).numpy())


def test_the_same_input_gives_the_same_bytes() -> None:
    weight, hessian, spec = _weight(), _hessian(), QuantSpec(4, PerBlock(32))
    first, second = (gptq(weight, hessian, spec).weight for _ in range(2))
    assert first.codes.tobytes() == second.codes.tobytes()
    assert first.scales.tobytes() == second.scales.tobytes()
