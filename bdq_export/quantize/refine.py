"""Coordinate descent on a quantized weight: better scales for the codes, then better codes for the scales.

Both steps lower the same error as GPTQ, `tr(E H Eᵀ)`, and neither can raise it: a row whose new scales, rounded to
fp16, are no better keeps its old ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdq_export.quantize.grid import Grid, round_codes, storable_scales, to_blocks
from bdq_runtime.packing import ODD

_PANEL = 64


def refine(
    weight: Tensor, hessian: Tensor, ridge: float, grid: Grid, codes: Tensor, sweeps: int
) -> tuple[Grid, Tensor]:
    """`sweeps` rounds of scales, then codes.

    Args:
        weight: `[N, K]` float32, what is approximated.
        hessian: `[K, K]` float32.
        ridge: added to the Hessian's diagonal (GPTQ's damping).
        grid: the grid of `codes`.
        codes: `[N, K]` float32.
        sweeps: rounds.

    Returns:
        The new grid and codes.
    """
    damped = hessian.clone()
    damped.diagonal().add_(ridge)
    damped /= float(damped.diagonal().mean())
    for _ in range(sweeps):
        grid = _refit_scales(weight, damped, grid, codes)
        codes = _descend(weight, damped, grid, codes)
    return grid, codes


def _row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """`diag(E H Eᵀ)` `[N]`."""
    return ((error @ hessian) * error).sum(1)


def _refit_scales(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """The scales of least error for `codes`: for each row one linear system in its B scales."""
    columns = codes.shape[1]
    block = grid.spec.block_size(columns)
    unit = 2.0 if grid.spec.grid == ODD else 1.0
    steps = (to_blocks(codes, grid.spec) - grid.zero_points.unsqueeze(-1)).mul_(unit).flatten(1)[:, :columns]
    count = grid.scales.shape[1]
    target = to_blocks((weight @ hessian) * steps, grid.spec).sum(-1)
    system = torch.zeros(codes.shape[0], count, count)
    for index in range(count):
        first = index * block
        span, rest = slice(first, min(first + block, columns)), slice(first, columns)
        product = (steps[:, span] @ hessian[span, rest]).mul_(steps[:, rest])
        system[:, index, index:] = to_blocks(product, grid.spec, block).sum(-1)
    system += system.triu(1).transpose(1, 2)
    diagonal = system.diagonal(dim1=1, dim2=2)
    # Blocks of zeros leave their scale undetermined: hold every scale, weakly, where it is.
    hold = 1e-4 * diagonal + 1e-6 * diagonal.mean(1, keepdim=True) + 1e-30
    target += hold * grid.scales
    diagonal += hold
    solved, failed = torch.linalg.solve_ex(system.double(), target.double())
    fitted = storable_scales(solved.float())
    usable = (failed == 0) & torch.isfinite(solved).all(1)
    if grid.spec.bits == 8:
        # Positive at 8 bits (see grid.py).
        usable &= (fitted > 0).all(1)
    candidate = Grid(torch.where(usable[:, None], fitted, grid.scales), grid.zero_points, grid.spec)
    better = _row_errors(candidate.values(codes) - weight, hessian) < _row_errors(grid.values(codes) - weight, hessian)
    return Grid(torch.where(better[:, None], candidate.scales, grid.scales), grid.zero_points, grid.spec)


def _descend(weight: Tensor, hessian: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """One pass over the columns, each moved to the code of least error while the others stay."""
    columns = codes.shape[1]
    block = grid.spec.block_size(columns)
    scales, zeros = grid.steps.t().contiguous(), grid.zero_points.t().contiguous()
    values = grid.values(codes).t().contiguous()
    slope = hessian @ (values - weight.t())
    result = codes.t().contiguous()
    pivots = hessian.diagonal().tolist()
    for start in range(0, columns, _PANEL):
        end = min(start + _PANEL, columns)
        before = values[start:end].clone()
        for index in range(start, end):
            group = index // block
            scale, zero = scales[group], zeros[group]
            best = torch.sub(values[index], slope[index], alpha=1.0 / pivots[index])
            code = round_codes(best.div_(scale), zero, grid.spec)
            value = code.sub(zero).mul_(scale)
            if index + 1 < end:
                moved = value - values[index]
                slope[index + 1 : end].addr_(hessian[index + 1 : end, index], moved)
            values[index], result[index] = value, code
        if end < columns:
            slope[end:].addmm_(hessian[end:, start:end], values[start:end] - before)
    return result.t().contiguous()
