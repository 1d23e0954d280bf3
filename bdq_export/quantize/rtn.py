"""Round to nearest: every value to the closest point of its block's grid."""

from __future__ import annotations

from torch import Tensor

from bdq_export.quantize.grid import FEW_RATIOS, range_grid, searched_grid
from bdq_runtime.packing import QuantizedWeight, QuantSpec


def rtn(weight: Tensor, spec: QuantSpec, *, search: bool = False, importance: Tensor | None = None) -> QuantizedWeight:
    """Quantize `weight` `[N, K]` of any float dtype without looking at other columns.

    Args:
        weight: `[N, K]`.
        spec: bits and granularity.
        search: choose the grid of least squared error instead of the one that just covers each block.
        importance: `[K]` weight of a column's squared error, for a searched grid.
    """
    grid = searched_grid(weight, spec, importance, FEW_RATIOS, polish=1) if search else range_grid(weight, spec)
    return grid.quantized(grid.codes(weight))
