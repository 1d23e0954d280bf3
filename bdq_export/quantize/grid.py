"""Scales and zero points of a weight: the grid that its values are rounded to.

Scales are stored as fp16, so every scale here is a float32 that fp16 represents exactly: codes are computed for the
scale that will be read back, not for a slightly different one.

A symmetric grid uses all `2^bits` codes, -2^(bits-1) to 2^(bits-1)-1. Below 8 bits its scale is signed: the extra code
goes to the side where the block's largest value lies. At 8 bits the scale is positive, which integer kernels expect.

The odd grid is the integer one moved by half a step: its levels are `(code - (2^bits - 1) / 2) * 2 scale`. In here it
has the steps `2 scale` and that half-integer zero point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bdq_runtime.packing import ODD, QuantizedWeight, QuantSpec

CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(8))
"""Fractions of the min/max range that a search tries; 1.0 comes first, so that ties keep the full range."""
_LOW_BIT_RATIOS = tuple(1.0 - 0.05 * step for step in range(8, 15))
"""With 4 or 8 levels a row of many columns is best clipped much further."""
FEW_RATIOS = (1.0, 0.9, 0.8)
"""For searches over a whole model at once: most of the gain in a third of the time."""

_SIGNED_SCALE_BITS = 7
_CHUNK_ELEMENTS = 1 << 18
"""Elements handled at once: 1 MiB of float32 stays in a core's second-level cache."""
_LEAST_SCALE = 6.0e-8
"""The least positive fp16; a block whose scale would be smaller is all zeros for every purpose."""
_LARGEST_SCALE = 65504.0
_LARGEST_ODD_BITS = 4
_FEW_LEVEL_BITS = 3


@dataclass(frozen=True)
class Grid:
    """The grid of a weight `[N, K]` cut into B blocks a row.

    Attributes:
        scales: `[N, B]` float32, exact in fp16, never 0.
        zero_points: `[N, B]` float32 integers; `2^(bits-1)` everywhere when the spec is symmetric, and
            `(2^bits - 1) / 2` on the odd grid.
        spec: bits and granularity.
    """

    scales: Tensor
    zero_points: Tensor
    spec: QuantSpec

    @property
    def steps(self) -> Tensor:
        """Distance of two levels `[N, B]`: the scales, twice the scales on the odd grid."""
        return self.scales * 2 if self.spec.grid == ODD else self.scales

    def codes(self, weight: Tensor) -> Tensor:
        """Codes `[N, K]` float32 of the values nearest to `weight` `[N, K]`."""
        result = torch.empty(weight.shape, dtype=torch.float32)
        steps = self.steps
        for rows in _row_chunks(weight.shape):
            blocks = to_blocks(weight[rows].float(), self.spec)
            codes = round_codes(blocks.div(steps[rows].unsqueeze(-1)), self.zero_points[rows].unsqueeze(-1), self.spec)
            result[rows] = codes.flatten(1)[:, : weight.shape[1]]
        return result

    def values(self, codes: Tensor) -> Tensor:
        """What `codes` `[N, K]` stand for, float32 `[N, K]`."""
        blocks = to_blocks(codes, self.spec)
        spread = (blocks - self.zero_points.unsqueeze(-1)) * self.steps.unsqueeze(-1)
        return spread.flatten(1)[:, : codes.shape[1]]

    def quantized(self, codes: Tensor) -> QuantizedWeight:
        """`codes` on this grid as the project's quantized weight."""
        return QuantizedWeight(
            codes.to(torch.uint8).numpy(),
            self.scales.numpy(),
            None if self.spec.symmetric else self.zero_points.to(torch.uint8).numpy(),
            self.spec,
        )


def round_codes(scaled: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of values given in steps; writes into `scaled`."""
    top = float((1 << spec.bits) - 1)
    if spec.grid == ODD:
        return scaled.add_(zero).round_().clamp_(0.0, top)
    return scaled.round_().add_(zero).clamp_(0.0, top)


def to_blocks(weight: Tensor, spec: QuantSpec, block: int | None = None) -> Tensor:
    """`[N, K]` -> `[N, B, block]`; the last block is padded with zeros where K is no multiple of the block.

    Args:
        weight: `[N, K]`.
        spec: gives the block size, unless `block` does.
        block: for some of the columns of a wider weight, which decide the size of a block of a whole row.
    """
    block = block or spec.block_size(weight.shape[1])
    padding = -weight.shape[1] % block
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(weight.shape[0], -1, block)


def storable_scales(scales: Tensor) -> Tensor:
    """`scales` rounded to fp16, as float32; a scale that would be 0 there becomes 1 (its block is all zeros)."""
    rounded = scales.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half().float()
    return torch.where(rounded.abs() < _LEAST_SCALE / 2, torch.ones_like(rounded), rounded)


def range_grid(weight: Tensor, spec: QuantSpec) -> Grid:
    """The grid that just covers each block of `weight` `[N, K]`: plain round-to-nearest."""
    return _by_chunks(weight, spec, lambda blocks: _covering(blocks, spec, 1.0))


def searched_grid(
    weight: Tensor,
    spec: QuantSpec,
    importance: Tensor | None = None,
    ratios: tuple[float, ...] = CLIP_RATIOS,
    polish: int = 2,
) -> Grid:
    """The grid of least squared error among clipped ranges, polished by least squares.

    Args:
        weight: `[N, K]`.
        spec: bits and granularity.
        importance: `[K]` weight of a column's squared error (the diagonal of the Hessian), or None for ones.
        ratios: fractions of the covering range to try.
        polish: rounds of "codes, then the scale that fits them best".
    """
    columns = None if importance is None else to_blocks(importance.float()[None], spec)
    return _by_chunks(weight, spec, lambda blocks: _search(blocks, spec, columns, ratios, polish))


def better_grid_kind(
    weight: Tensor, spec: QuantSpec, importance: Tensor | None = None, ratios: tuple[float, ...] = CLIP_RATIOS
) -> QuantSpec:
    """`spec` on the integer or the odd grid, whichever fits `weight` `[N, K]` with less squared error.

    A spec without an odd grid (more than 4 bits, asymmetric) is returned as it is.
    """
    if not spec.symmetric or spec.bits > _LARGEST_ODD_BITS:
        return spec
    weight = weight.float()

    def error(candidate: QuantSpec) -> float:
        grid = searched_grid(weight, candidate, importance, ratios)
        squares = (grid.values(grid.codes(weight)) - weight).square_()
        return float((squares if importance is None else squares.mul_(importance)).sum(dtype=torch.float64))

    return min((spec, replace(spec, grid=ODD)), key=error)


def _row_chunks(shape: torch.Size) -> Iterator[slice]:
    rows = max(1, _CHUNK_ELEMENTS // shape[1])
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def _by_chunks(weight: Tensor, spec: QuantSpec, find: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Grid:
    found = [find(to_blocks(weight[rows].float(), spec)) for rows in _row_chunks(weight.shape)]
    return Grid(torch.cat([scales for scales, _ in found]), torch.cat([zeros for _, zeros in found]), spec)


def _covering(blocks: Tensor, spec: QuantSpec, ratio: float, flip: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[N, B]` for `ratio` of the range of `blocks` `[N, B, block]`.

    `flip` gives a signed symmetric scale the other sign (the extra code on the side of the smaller extreme).
    """
    low, high = blocks.amin(-1).clamp_(max=0.0) * ratio, blocks.amax(-1).clamp_(min=0.0) * ratio
    half = 1 << (spec.bits - 1)
    if not spec.symmetric:
        scales = storable_scales((high - low) / (2 * half - 1))
        return scales, (-low / scales).round_().clamp_(0, 2 * half - 1)
    largest = torch.maximum(-low, high)
    if spec.grid == ODD:
        # No level is 0: what is all zeros gets the least scale there is.
        zero = half - 0.5
        return storable_scales((largest / (2 * zero)).clamp_(min=_LEAST_SCALE)), torch.full_like(largest, zero)
    if spec.bits > _SIGNED_SCALE_BITS:
        scales = largest / (half - 1)
    elif flip:
        scales = torch.where(high > -low, largest, -largest) / (half - 1)
    else:
        scales = torch.where(high > -low, -largest, largest) / half
    return storable_scales(scales), torch.full_like(scales, float(half))


def _search(
    blocks: Tensor, spec: QuantSpec, importance: Tensor | None, ratios: tuple[float, ...], polish: int
) -> tuple[Tensor, Tensor]:
    best_scales, best_zeros = _covering(blocks, spec, 1.0)
    best_error = torch.full_like(best_scales, float("inf"))
    signed = spec.symmetric and spec.bits <= _SIGNED_SCALE_BITS and spec.grid != ODD
    if spec.symmetric and spec.bits <= _FEW_LEVEL_BITS:
        ratios, polish = (*ratios, *_LOW_BIT_RATIOS), polish + 2
    candidates = [(ratio, flip) for ratio in ratios for flip in ((False, True) if signed else (False,))]
    for ratio, flip in candidates:
        scales, zeros = _covering(blocks, spec, ratio, flip)
        best_error = _keep_better(blocks, spec, importance, scales, zeros, best_scales, best_zeros, best_error)
    for _ in range(polish):
        scales = _fitting_scales(blocks, spec, importance, best_scales, best_zeros)
        best_error = _keep_better(
            blocks, spec, importance, scales, best_zeros.clone(), best_scales, best_zeros, best_error
        )
    return best_scales, best_zeros


def _steps(blocks: Tensor, spec: QuantSpec, scales: Tensor, zeros: Tensor) -> Tensor:
    """The levels nearest to `blocks`, in scales: integers, odd ones on the odd grid."""
    zero = zeros.unsqueeze(-1)
    unit = 2.0 if spec.grid == ODD else 1.0
    scaled = blocks.div((scales * unit).unsqueeze(-1))
    return round_codes(scaled, zero, spec).sub_(zero).mul_(unit)


def _keep_better(
    blocks: Tensor,
    spec: QuantSpec,
    importance: Tensor | None,
    scales: Tensor,
    zeros: Tensor,
    best_scales: Tensor,
    best_zeros: Tensor,
    best_error: Tensor,
) -> Tensor:
    """Write the candidate into `best_*` where its error is less; returns the least errors `[N, B]`."""
    difference = _steps(blocks, spec, scales, zeros).mul_(scales.unsqueeze(-1)).sub_(blocks).square_()
    if importance is not None:
        difference.mul_(importance)
    error = difference.sum(-1)
    better = error < best_error
    torch.where(better, scales, best_scales, out=best_scales)
    torch.where(better, zeros, best_zeros, out=best_zeros)
    return torch.minimum(error, best_error)


def _fitting_scales(
    blocks: Tensor, spec: QuantSpec, importance: Tensor | None, scales: Tensor, zeros: Tensor
) -> Tensor:
    """The scales that fit `blocks` best in the least-squares sense when the codes stay as they are."""
    steps = _steps(blocks, spec, scales, zeros)
    weighted = steps if importance is None else steps * importance
    energy = (weighted * steps).sum(-1)
    fitted = (weighted * blocks).sum(-1) / energy.clamp(min=1e-30)
    return storable_scales(torch.where(energy > 0, fitted, scales))
