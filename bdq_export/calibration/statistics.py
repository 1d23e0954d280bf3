"""Statistics of the inputs of linear layers, summed up batch by batch in float32 or better."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.transform.flatness import flatness

_FLATNESS_TOKENS = 512


@dataclass(frozen=True, eq=False)
class InputStatistics:
    """What the inputs `[tokens, K]` of a linear look like.

    Attributes:
        tokens: number of inputs seen.
        energy: E[x²] of each channel, float64 `[K]`.
        absmax: largest |x| of each channel, float32 `[K]`.
        low: least value of all.
        high: largest value of all.
        flatness: of the first tokens' inputs as one matrix (see `bdq_export.transform.flatness`).
        hessian: (weighted) mean of x xᵀ, float32 `[K, K]`, if it was asked for, correlations `shrunk`.
    """

    tokens: int
    energy: Tensor
    absmax: Tensor
    low: float
    high: float
    flatness: float
    hessian: Tensor | None


class InputObserver:
    """Collects `InputStatistics` for the modules it is called with; an `Observer` of `BlockRunner.run`.

    Args:
        hessians: collect those, too.
        weights: of the tokens in Hessians, in the order in which they come, with a mean of 1; None counts all alike.
    """

    def __init__(self, hessians: bool = False, weights: Tensor | None = None) -> None:
        self._hessians = hessians
        self._weights = weights
        self._sums: dict[str, _Sums] = {}

    def __call__(self, path: str, inputs: Tensor) -> None:
        """Add `inputs` `[..., K]` of the module `path`."""
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if path not in self._sums:
            self._sums[path] = _Sums(rows, self._hessians)
        sums = self._sums[path]
        seen = sums.tokens
        sums.add(rows, None if self._weights is None else self._weights[seen : seen + len(rows), None])

    def statistics(self, path: str) -> InputStatistics:
        """What was seen of `path`.

        Raises:
            LookupError: nothing was.
        """
        if path not in self._sums:
            raise LookupError(f"no inputs of {path!r} were observed")
        return self._sums[path].finish()

    def paths(self) -> Iterable[str]:
        """Modules that were observed, in the order of their first inputs."""
        return self._sums.keys()


def shrunk(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two Gram matrices `[K, K]` of independent inputs, off-diagonals scaled down by their agreement.

    A few thousand tokens leave most correlations of a wide layer to chance, and GPTQ makes use of chance: without
    this it can do worse than rounding on other tokens. What both halves agree on is signal: with correlations A and B,
    `Σ AB / Σ ((A + B) / 2)²` over the off-diagonal estimates its share.
    """
    total = first + second
    roots = [gram.diagonal().clamp(min=0).sqrt() for gram in (first, second)]
    parts = []
    for gram, root in zip((first, second), roots, strict=True):
        scale = torch.where(root > 0, 1 / root, 0.0)
        correlation = gram * scale[:, None] * scale
        correlation.fill_diagonal_(0)
        parts.append(correlation)
    seen = float((parts[0] + parts[1]).square().sum()) / 4
    signal = float((parts[0] * parts[1]).sum())
    share = min(max(signal / seen, 0.0), 1.0) if seen > 0 else 1.0
    result = total * share
    result.diagonal().copy_(total.diagonal())
    return result


class _Sums:
    def __init__(self, first: Tensor, hessian: bool) -> None:
        size = first.shape[1]
        self.tokens = 0
        self.square = torch.zeros(size, dtype=torch.float64)
        self.absmax = torch.zeros(size)
        self.low, self.high = float("inf"), float("-inf")
        self.flatness = flatness(first[:_FLATNESS_TOKENS]) if bool(first[:_FLATNESS_TOKENS].any()) else 0.0
        self.grams = (torch.zeros(size, size), torch.zeros(size, size)) if hessian else None
        self._finished: InputStatistics | None = None

    def add(self, rows: Tensor, weights: Tensor | None = None) -> None:
        self.tokens += rows.shape[0]
        low, high = rows.amin(0), rows.amax(0)
        self.absmax = torch.maximum(self.absmax, torch.maximum(-low, high))
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        self.square += rows.square().sum(0).double()
        if self.grams is None:
            return
        # float32 also under autocast: rounding to bfloat16 can make the matrix indefinite.
        weighted = rows if weights is None else rows * weights.sqrt()
        with torch.autocast("cpu", enabled=False):
            for gram, half in zip(self.grams, weighted.tensor_split(2), strict=True):
                gram.addmm_(half.t(), half)

    def finish(self) -> InputStatistics:
        """Of what all processes have seen; the same at every call."""
        if self._finished is None:
            self._finished = self._together()
        return self._finished

    def _together(self) -> InputStatistics:
        parallel.add_up(self.square, *(self.grams or ()))
        self.tokens = round(parallel.total(self.tokens)[0])
        ends = torch.tensor([-self.low, self.high])
        parallel.largest(self.absmax, ends)
        self.low, self.high = -float(ends[0]), float(ends[1])
        hessian = None if self.grams is None else shrunk(*self.grams) / self.tokens
        return InputStatistics(
            self.tokens, self.square / self.tokens, self.absmax, self.low, self.high, self.flatness, hessian
        )
