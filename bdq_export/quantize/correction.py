"""Aim at the float model's outputs, although the quantized model's inputs have moved away from the float ones (GPTAQ).

GPTQ keeps `W X̂` for the inputs X̂ that the quantized blocks before produce. What should come out is `W X`. Without
rounding, the weight that comes closest is, in the ridge sense,

    W + W (X - X̂) X̂ᵀ (X̂ X̂ᵀ + δ)⁻¹

and GPTQ rounds that one instead.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.sites import Site
from bdq_export.calibration.statistics import InputObserver

DAMPING = 0.3
"""δ as a share of the mean diagonal: stronger than GPTQ's own, because the correction is fitted to noise too."""


class FloatInputs:
    """The float model, run beside the quantized one: the inputs of the linears of one block at a time.

    Args:
        runner: of a float model, over the same tokens as the quantized one's.
    """

    def __init__(self, runner: BlockRunner) -> None:
        self._runner = runner
        self._hidden = runner.embedded()
        self._inputs: dict[str, list[Tensor]] = {}

    def advance(self, layer: int, sites: Sequence[Site]) -> None:
        """Run block `layer` (blocks in order), keeping the inputs of `sites` in place of those of the block before."""
        self._inputs = {site.module: [] for site in sites}

        def keep(path: str, inputs: Tensor) -> None:
            # Half the memory; the rounding is far below the gap that is measured.
            self._inputs[path].append(inputs.reshape(-1, inputs.shape[-1]).bfloat16())

        self._hidden = self._runner.run(layer, self._hidden, keep, [site.module for site in sites])

    def observer(self, module: str) -> GapObserver:
        """An observer for the quantized model's inputs of `module`, batch by batch in the same order."""
        return GapObserver(self._inputs[module])


class GapObserver(InputObserver):
    """Also sums up `(x - x̂) x̂ᵀ` of float inputs x and observed inputs x̂."""

    def __init__(self, floats: Sequence[Tensor]) -> None:
        super().__init__(hessians=True)
        self._floats = iter(floats)
        self._tokens = 0
        self._together = False
        self._gap: Tensor | None = None

    def __call__(self, path: str, inputs: Tensor) -> None:
        """Add the inputs `[..., K]` of one batch."""
        super().__call__(path, inputs)
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        if self._gap is None:
            self._gap = torch.zeros(rows.shape[1], rows.shape[1])
        with torch.autocast("cpu", enabled=False):
            gap = next(self._floats).float() - rows
            self._gap.addmm_(gap.t(), rows)
        self._tokens += rows.shape[0]

    def corrected(self, weight: Tensor, hessian: Tensor) -> Tensor:
        """The weight `[N, K]` float32 to round instead of `weight`; `weight` itself where the Hessian is singular.

        Args:
            weight: `[N, K]`.
            hessian: mean of x̂ x̂ᵀ, `[K, K]`.
        """
        if self._gap is not None and not self._together:
            parallel.add_up(self._gap)
            self._tokens = round(parallel.total(self._tokens)[0])
            self._together = True
        damped = hessian.double()
        damped.diagonal().add_(DAMPING * float(damped.diagonal().mean()))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if self._gap is None or int(failed) or not bool(torch.isfinite(self._gap).all()):
            return weight.float()
        wanted = weight.double() @ (self._gap.double() / self._tokens)
        return (weight.double() + torch.cholesky_solve(wanted.t(), lower).t()).float()
