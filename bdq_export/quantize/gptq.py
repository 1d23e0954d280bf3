"""GPTQ: round one column at a time and let the columns not yet rounded make up for the error.

The grid is fixed before the first column ("static groups"), so columns may be taken in any order: the ones with the
most energetic inputs go first. The order is only one of processing; codes and scales stay where their columns are.

Where the curvature of the loss by the outputs is known, rows of a column make up for each other, too
(`nearest_plane`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export.quantize.grid import Grid, searched_grid
from bdq_export.quantize.nearest_plane import NearestPlane, plain_codes
from bdq_export.quantize.refine import refine
from bdq_runtime.packing import QuantizedWeight, QuantSpec

_PANEL = 64
"""Columns rounded before their error is spread over the rest in one product."""
_DAMPING_TRIES = 3
_LEAST_IMPORTANCE = 1e-4
_OUTPUT_DAMPING = 0.02
"""Less than for the inputs: 0.1 gains a little less (SmolLM2, w4a16 in blocks of 128: 0.0914 nats against 0.0904)."""
_CHANCE_DAMPING = 0.2
"""Times outputs by tokens: what few tokens say of many outputs is chance. Below 0.02 from ten times as many on."""


@dataclass(frozen=True)
class GptqOptions:
    """How GPTQ runs.

    Attributes:
        damping: share of the Hessian's mean diagonal added to its diagonal; ten times as much where that is not
            enough to make it positive definite, and ten times again. A tenth, not the usual hundredth: a few thousand
            tokens do not say more about a wide layer (see `statistics.shrunk`).
        sweeps: rounds of refinement of scales and codes afterwards; 0 for none. Two lower the error on the calibration
            tokens and raised the loss on others (SmolLM2, first 8 blocks: 0.0330 nats against 0.0323).
        importance: weigh the grid search by the Hessian's diagonal.
        act_order: take columns in the order of falling input energy.
    """

    damping: float = 0.1
    sweeps: int = 0
    importance: bool = True
    act_order: bool = True


@dataclass(frozen=True)
class GptqResult:
    """A quantized weight and how it came about.

    Attributes:
        weight: codes, scales and zero points.
        damping: the damping that made the Hessian positive definite, or None where none did.
        fallback: why the weight was rounded to nearest instead, or None.
    """

    weight: QuantizedWeight
    damping: float | None
    fallback: str | None = None


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    options: GptqOptions | None = None,
    grid: Grid | None = None,
    outputs: Sequence[Tensor] = (),
) -> GptqResult:
    """Quantize `weight` `[N, K]` so that `tr(G E H Eᵀ)` of its error E is small.

    Args:
        weight: `[N, K]`, any float dtype.
        hessian: `[K, K]`: the sum (or mean) of x xᵀ over the calibration inputs, any float dtype.
        spec: bits and granularity.
        options: damping and refinement.
        grid: of `spec`, to round to; None searches one.
        outputs: what `output_factor` makes of G, by groups of consecutive rows; none where rows are independent.
    """
    options = options or GptqOptions()
    weight = weight.float()
    diagonal = hessian.diagonal().double()
    if not bool(torch.isfinite(hessian).all()) or float(diagonal.sum()) <= 0:
        grid = grid or searched_grid(weight, spec)
        reason = "the Hessian is all zeros or has values that are not finite; rounded to nearest"
        return GptqResult(grid.quantized(grid.codes(weight)), None, reason)
    importance = None
    if options.importance and grid is None:
        # A column whose input is always 0 is rounded like any other, but must not steer the search.
        importance = diagonal.clamp(min=float(diagonal.mean()) * _LEAST_IMPORTANCE).float()
    grid = grid or searched_grid(weight, spec, importance)
    order = torch.arange(weight.shape[1])
    if options.act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    damped = _factor(hessian[order][:, order].double(), options.damping)
    if damped is None:
        reason = "the Hessian is not positive definite; rounded to nearest"
        return GptqResult(grid.quantized(grid.codes(weight)), None, reason)
    factor, damping = damped
    planes = NearestPlane(outputs) if outputs else None
    codes = _round_columns(weight, factor.float(), grid, order, planes)
    if options.sweeps:
        ridge = damping * float(diagonal.mean())
        grid, codes = refine(weight, hessian.float(), ridge, grid, codes, options.sweeps)
    return GptqResult(grid.quantized(codes), damping)


def hessian_error(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    """`tr(E H Eᵀ)` of the rounding error E `[N, K]`: the squared output error that the Hessian's inputs see."""
    error = torch.from_numpy(quantized.dequantize()).double() - weight.double()
    return float(((error @ hessian.double()) * error).sum())


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """Upper Cholesky factor of the inverse of the damped Hessian `[K, K]` float64, and the damping that worked."""
    mean = float(hessian.diagonal().mean())
    for _ in range(_DAMPING_TRIES):
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damping
        damping = max(damping, 1e-3) * 10.0
    return None


def output_factor(curvature: Tensor, tokens: int) -> Tensor:
    """U `[n, n]` float64 of `G⁻¹ = Uᵀ D U`, unit upper triangular, of a group of rows; damped.

    Args:
        tokens: how many it is of.
        curvature: G `[n, n]`, second moments of the loss's gradient by the outputs. Where it is all zeros or not finite
            the result is the identity, with which rows are rounded as if they were independent.
    """
    if bool(torch.isfinite(curvature).all()) and float(curvature.diagonal().sum()) > 0:
        damping = max(_OUTPUT_DAMPING, _CHANCE_DAMPING * len(curvature) / tokens)
        damped = _factor(curvature.double(), damping)
        if damped is not None:
            return damped[0] / damped[0].diagonal()[:, None]
    return torch.eye(len(curvature), dtype=torch.float64)


def _round_columns(
    weight: Tensor, factor: Tensor, grid: Grid, order: Tensor, planes: NearestPlane | None = None
) -> Tensor:
    """Codes `[N, K]` float32 of `weight`, taking columns in `order`; `factor` is for columns in that order."""
    columns = weight.shape[1]
    block = grid.spec.block_size(columns)
    # Transposed, so that a column is a contiguous row.
    rest = weight.t()[order].contiguous()
    scales, zeros = grid.steps.t().contiguous(), grid.zero_points.t().contiguous()
    codes = torch.empty_like(rest)
    rounded = plain_codes if planes is None else planes.codes
    place = [int(column) for column in order]
    for start in range(0, columns, _PANEL):
        end = min(start + _PANEL, columns)
        errors = torch.empty(end - start, rest.shape[1])
        for index in range(start, end):
            group = place[index] // block
            value, scale, zero = rest[index], scales[group], zeros[group]
            code = rounded(value, scale, zero, grid.spec)
            codes[index] = code
            error = value.sub(code.sub(zero).mul_(scale)).div_(factor[index, index])
            errors[index - start] = error
            if index + 1 < end:
                rest[index + 1 : end].addr_(factor[index, index + 1 : end], error, alpha=-1.0)
        if end < columns:
            rest[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1.0)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()
