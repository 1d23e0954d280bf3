"""Grids: exact where they can be, stored as fp16, better when searched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdq_export.quantize.grid import Grid, better_grid_kind, range_grid, searched_grid, storable_scales
from bdq_export.quantize.rtn import rtn
from bdq_runtime.packing import INTEGER, ODD, PerBlock, PerChannel, QuantSpec

SPECS = [
    QuantSpec(bits, granularity, symmetric)
    for bits in (2, 4, 8)
    for granularity in (PerBlock(16), PerBlock(32), PerChannel())
    for symmetric in (True, False)
] + [QuantSpec(bits, granularity, grid=ODD) for bits in (2, 3, 4) for granularity in (PerBlock(16), PerChannel())]


def _weight(rows: int = 24, columns: int = 80) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, columns, generator=generator) * 0.1


def _error(weight: torch.Tensor, values: np.ndarray) -> float:
    return float((torch.from_numpy(values) - weight).square().sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_representable_weights_come_back_exactly(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 1 << spec.bits, (6, 80), generator=generator).float()
    block = spec.block_size(80)
    codes[:, ::block], codes[:, 1::block] = 0, (1 << spec.bits) - 1  # every block spans its whole range
    if spec.symmetric and spec.bits == 8:
        codes.clamp_(min=1)  # a positive scale covers -127 to 127
    blocks = -(-80 // block)
    scales = (torch.rand(6, blocks, generator=generator) + 0.5).half().float()
    half = 1 << (spec.bits - 1)
    zeros = torch.full((6, blocks), half - 0.5 if spec.grid == ODD else float(half))
    if not spec.symmetric:
        zeros = torch.randint(1, half + 1, (6, blocks), generator=generator).float()
    weight = Grid(scales, zeros, spec).values(codes)
    quantized = rtn(weight, spec)
    np.testing.assert_allclose(quantized.dequantize(), weight.numpy(), atol=1e-6 * float(weight.abs().max()))
    broken = Grid(torch.from_numpy(quantized.scales) * 1.01, zeros, spec).values(codes)
    assert _error(weight, broken.numpy()) > 10 * _error(weight, quantized.dequantize())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scales_survive_fp16_and_errors_stay_within_a_step(spec: QuantSpec) -> None:
    weight = _weight()
    quantized = rtn(weight, spec)
    assert np.array_equal(quantized.scales, quantized.scales.astype(np.float16).astype(np.float32))
    distance = 2 if spec.grid == ODD else 1
    steps = distance * np.repeat(np.abs(quantized.scales), spec.block_size(80), axis=1)[:, :80]
    error = np.abs(quantized.dequantize() - weight.numpy())
    # Half a step, and as much again where a rounded zero point or the missing symmetric code clips.
    assert (error <= 1.01 * steps).all()


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_search_is_never_worse_and_a_wrong_scale_is(spec: QuantSpec) -> None:
    weight = _weight()
    plain, searched = rtn(weight, spec), rtn(weight, spec, search=True)
    assert _error(weight, searched.dequantize()) <= _error(weight, plain.dequantize()) * (1 + 1e-6)
    assert _error(weight, searched.dequantize() * np.float32(1.01)) > _error(weight, searched.dequantize())


def test_few_levels_are_better_off_on_the_odd_grid() -> None:
    weight = _weight(24, 400)
    spec = QuantSpec(2, PerChannel())
    assert better_grid_kind(weight, spec).grid == ODD
    assert better_grid_kind(torch.full((4, 16), 0.3) * torch.arange(-2, 2).repeat(4), spec).grid == INTEGER
    for other in (QuantSpec(8, PerChannel()), QuantSpec(2, PerChannel(), symmetric=False)):
        assert better_grid_kind(weight, other) == other


def test_a_search_follows_the_importance_of_columns() -> None:
    weight, spec = _weight(), QuantSpec(3, PerBlock(16))
    importance = torch.ones(80)
    importance[::4] = 100.0

    def weighted(grid: Grid) -> float:
        return float(((grid.values(grid.codes(weight)) - weight).square() * importance).sum())

    assert weighted(searched_grid(weight, spec, importance)) < weighted(searched_grid(weight, spec))


@pytest.mark.parametrize("columns", [33, 16, 100])
def test_columns_need_not_fill_the_last_block(columns: int) -> None:
    weight = _weight(8, columns)
    quantized = rtn(weight, QuantSpec(8, PerBlock(32)), search=True)
    assert quantized.scales.shape == (8, -(-columns // 32))
    assert _error(weight, quantized.dequantize()) < 1e-4 * float(weight.square().sum())


def test_blocks_of_zeros_and_of_tiny_values_are_finite() -> None:
    weight = torch.zeros(2, 64)
    weight[1, :32] = 1e-12
    for spec in SPECS:
        quantized = rtn(weight, spec, search=True)
        assert np.isfinite(quantized.dequantize()).all()
        assert (quantized.scales != 0).all()
        assert np.abs(quantized.dequantize()).max() < 1e-6


def test_symmetric_scales_are_positive_at_8_bits_and_signed_below() -> None:
    weight = _weight()
    assert (range_grid(weight, QuantSpec(8, PerChannel())).scales > 0).all()
    signs = range_grid(weight, QuantSpec(4, PerBlock(16))).scales.sign().unique()
    assert signs.tolist() == [-1.0, 1.0]


def test_storable_scales_are_finite_in_fp16() -> None:
    assert storable_scales(torch.tensor([1e9, -1e9, 0.0, 1e-20])).tolist() == [65504.0, -65504.0, 1.0, 1.0]
