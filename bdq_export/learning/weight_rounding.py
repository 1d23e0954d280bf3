"""Weights rounded with gradients: straight through the rounding, and to the reach of each row's grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bdq_export.quantize.grid import Grid, searched_grid, storable_scales, to_blocks
from bdq_runtime.packing import ODD, QuantSpec

_LEAST = 1e-12
_REACH = (0.05, 1.2)


@dataclass(frozen=True, eq=False)
class RowGrids:
    """Symmetric grids whose steps follow the largest weight of each block.

    Attributes:
        spec: bits and block size.
        reach: part of the largest weight that a grid covers, `[N, B]`; its sign is the step's, which says on which
            side the integer grid has its one level more.
    """

    spec: QuantSpec
    reach: Tensor

    @classmethod
    def searched(cls, weight: Tensor, spec: QuantSpec) -> RowGrids:
        """The reach that a search finds for `weight` `[N, K]`."""
        steps = searched_grid(weight.detach(), spec).steps
        largest = to_blocks(weight.detach(), spec).abs().amax(-1).clamp_min(_LEAST)
        reach = steps * _half(spec) / largest
        return cls(spec, torch.copysign(reach.abs().clamp(*_REACH), reach))

    def round(self, weight: Tensor, log_reach: Tensor) -> Tensor:
        """`weight` `[N, K]` rounded, with gradients to it and to `log_reach` `[N, 1]`."""
        blocks = to_blocks(weight, self.spec)
        largest = blocks.detach().abs().amax(-1).clamp_min(_LEAST)
        steps = (largest * self.reach * log_reach.exp() / _half(self.spec)).unsqueeze(-1)
        values: Tensor = _Rounded.apply(blocks, steps, self.spec)  # type: ignore[no-untyped-call]
        return values.flatten(1)[:, : weight.shape[1]]

    def grid(self, weight: Tensor, log_reach: Tensor) -> Grid:
        """The grid, as it is stored, that `round` has for `weight` `[N, K]` and `log_reach` `[N, 1]`."""
        odd = self.spec.grid == ODD
        largest = to_blocks(weight.detach().float(), self.spec).abs().amax(-1).clamp_min(_LEAST)
        steps = largest * self.reach * log_reach.detach().exp() / _half(self.spec)
        zero = float(1 << (self.spec.bits - 1)) - (0.5 if odd else 0.0)
        scales = storable_scales(steps / 2 if odd else steps)
        return Grid(scales, torch.full_like(scales, zero), self.spec)


class _Rounded(torch.autograd.Function):
    """Derivatives of `(round(clamp(w / s - o)) + o) s`, straight through the rounding, in few passes over memory."""

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, steps: Tensor, spec: QuantSpec) -> Tensor:
        low, high = -(1 << (spec.bits - 1)), (1 << (spec.bits - 1)) - 1
        # The odd grid lies half a step beside the integer one: levels ±1/2, ±3/2, ...
        offset = 0.5 if spec.grid == ODD else 0.0
        exact = torch.sub(blocks / steps, offset)
        levels = exact.clamp(low, high)
        inside = exact == levels
        levels.round_()
        # d value / d step: the level, less the share that the level itself gives back inside of the grid.
        by_step = torch.sub(levels, exact.mul_(inside)).add_(offset * ~inside if offset else 0.0)
        ctx.save_for_backward(inside, by_step.bfloat16())
        return levels.add_(offset).mul_(steps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        inside, by_step = ctx.saved_tensors
        return gradient * inside, (gradient * by_step).sum(-1, keepdim=True), None


def _half(spec: QuantSpec) -> float:
    return ((1 << spec.bits) - 1) / 2 if spec.grid == ODD else (1 << (spec.bits - 1)) - 1


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    """Mean over tokens of |found - expected|² / |expected|², `[]`: what a norm that follows sees of an error."""
    total = expected.square().sum(-1).clamp_min(_LEAST)
    mean: Tensor = ((found - expected).square().sum(-1) / total).mean()
    return mean


def total_error(found: Tensor, expected: Tensor) -> Tensor:
    """|found - expected|² / |expected|² of all tokens together, `[]`: a mean squared error, relative to the outputs."""
    return (found - expected).square().sum() / expected.square().sum().clamp_min(_LEAST)
