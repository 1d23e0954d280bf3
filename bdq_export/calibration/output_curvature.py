"""What errors at the outputs of linears cost together, and at which tokens: GPTQ beyond one linear's squared error.

To second order KL(float ‖ quantized) is half of `E (gᵀ E x)²`, with x the inputs of a linear, E the error of its weight
and g the gradient of the log-likelihood of a label drawn from the model, at the linear's outputs. K-FAC (Martens and
Grosse, arXiv 1503.05671) takes g and x as independent: `tr(G E H Eᵀ)` with `G = E g gᵀ` and `H = E x xᵀ`. GPTQ has
G = 1; YAQA (arXiv 2505.22988) rounds by both. Here

- G is taken within groups of `GROUP` consecutive outputs, its correlations shrunk by the agreement of two halves of the
  tokens as those of H are; groups of 256 outputs gain half as much as whole linears;
- a token counts in H by the root of its |g|²: fully weighted (what independence leaves out) a few tokens are all that
  counts.

docs/measurements.md has the figures.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.output_gradients import SiteGradients, site_gradients
from bdq_export.calibration.output_groups import GROUP
from bdq_export.calibration.statistics import InputObserver, InputStatistics
from bdq_export.process_memory import return_freed_memory
from bdq_export.progress import Progress
from bdq_export.quantize.gptq import output_factor
from bdq_export.scratch import Scratch
from bdq_models import Architecture, Dimensions
from bdq_runtime.specs import OnlineTransform

_WEIGHT_POWER = 0.5
_LARGEST_WEIGHT = 10.0


@dataclass(frozen=True, eq=False)
class OutputCurvature:
    """Of all linears of a model.

    Attributes:
        measured: canonical path of a linear -> `gptq.output_factor` of its groups of outputs, `packed`: a factor that
            was rounded to float16 still belongs to a positive definite matrix, a matrix may not.
        weights: module of a site -> weights of this process's tokens, `[tokens]`, mean 1 over all processes.
        output_scales: canonical path of a linear -> what its outputs `[N]` were multiplied with since then, looked up
            when factors are; 1 where it has none. Weights of tokens stay as they are.
    """

    measured: Mapping[str, tuple[Tensor, ...]]
    weights: Mapping[str, Tensor]
    output_scales: Mapping[str, Tensor] = field(default_factory=dict)

    def factors(self, path: str) -> list[Tensor]:
        """Of the groups of outputs of linear `path`, float32 `[n, n]` each."""
        found = [unpacked(each) for each in self.measured[path]]
        scale = self.output_scales.get(path)
        if scale is None:
            return found
        # Outputs times S have gradients times S⁻¹: G becomes S⁻¹ G S⁻¹, and its unit triangular factor S⁻¹ U S.
        parts = torch.split(scale.to(torch.float32), [len(factor) for factor in found])
        return [factor * part / part[:, None] for factor, part in zip(found, parts, strict=True)]


def output_curvature(
    runner: BlockRunner,
    architecture: Architecture,
    dimensions: Dimensions,
    online: Mapping[str, OnlineTransform],
    seeds: Sequence[int],
    progress: Progress,
    scratch: Scratch | None = None,
) -> OutputCurvature:
    """Measure it.

    Args:
        runner: of the float model, whose inputs nothing else transforms, over this process's tokens.
        architecture: its family.
        dimensions: its sizes.
        online: what each linear applies to its input first, by canonical path.
        seeds: of the labels of each sequence (`label_seeds`).
        progress: shows a stage with a step for each block.
        scratch: where factors and inputs of blocks are kept; None keeps them in memory.
    """

    def kept(values: Tensor) -> Tensor:
        if scratch is None:
            return values
        # NumPy has no bfloat16.
        bits = values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)
        return torch.from_numpy(scratch.keep(bits.numpy())).view(values.dtype)

    factors: dict[str, tuple[Tensor, ...]] = {}
    weights: dict[str, Tensor] = {}
    with progress.stage("curvature", total=dimensions.layers) as stage:
        for parts in site_gradients(runner, architecture, dimensions, online, seeds, kept):
            measured, block_weights = _measured(parts)
            factors.update({path: tuple(kept(each) for each in groups) for path, groups in measured.items()})
            weights.update(block_weights)
            # Moments come and go in sizes that the allocator keeps in pieces: 5 MB a block of a synthetic Llama.
            del measured
            return_freed_memory()
            stage.advance()
    return OutputCurvature(factors, weights)


def _measured(
    parts: Iterable[Sequence[SiteGradients]],
) -> tuple[dict[str, tuple[Tensor, ...]], dict[str, Tensor]]:
    """Of one block, whose batches are `parts`: packed factors by path, weights of tokens by module."""
    seen = _Block()
    for batch in parts:
        seen.add(batch)
    factors = {}
    for path, observer in seen.moments.items():
        factors[path] = tuple(packed(_factor(observer.statistics(group))) for group in observer.paths())
    weights = {
        module: _weights([torch.cat(seen.squares[path]) for path in paths]) for module, paths in seen.sites.items()
    }
    return factors, weights


class _Block:
    """What the gradients at the outputs of the linears of one block are like.

    Attributes:
        sites: module -> paths.
        moments: path -> statistics of each group of outputs, Hessians included: E g gᵀ, shrunk.
        squares: path -> |g|² of each token, batch by batch.
    """

    def __init__(self) -> None:
        self.sites: dict[str, tuple[str, ...]] = {}
        self.moments: dict[str, InputObserver] = {}
        self.squares: dict[str, list[Tensor]] = {}

    def add(self, batch: Sequence[SiteGradients]) -> None:
        """Add a batch of tokens."""
        for seen in batch:
            self.sites[seen.site.module] = seen.site.paths
            for path, gradients in seen.gradients.items():
                self.squares.setdefault(path, []).append(gradients.square().sum(1))
                observer = self.moments.setdefault(path, InputObserver(hessians=True))
                for index, group in enumerate(torch.split(gradients, GROUP, 1)):
                    observer(str(index), group)


def _factor(seen: InputStatistics) -> Tensor:
    assert seen.hessian is not None, "observed with Hessians"
    return output_factor(seen.hessian, seen.tokens)


def packed(factor: Tensor) -> Tensor:
    """What is above the diagonal of a unit upper triangular `factor` `[n, n]`, row by row, as float16."""
    rows, columns = torch.triu_indices(len(factor), len(factor), 1)
    return factor[rows, columns].half()


def unpacked(above: Tensor) -> Tensor:
    """Inverse of `packed`, float32."""
    size = (1 + math.isqrt(1 + 8 * len(above))) // 2
    factor = torch.eye(size)
    rows, columns = torch.triu_indices(size, size, 1)
    factor[rows, columns] = above.float()
    return factor


def _weights(squares: list[Tensor]) -> Tensor:
    """Weights of tokens from the squared norms `[tokens]` of their gradients at each linear of a site."""
    relative = torch.zeros_like(squares[0])
    for each in squares:
        relative += each / max(parallel.mean_of(each), torch.finfo(each.dtype).tiny)
    weights = relative.pow(_WEIGHT_POWER)
    weights = (weights / max(parallel.mean_of(weights), torch.finfo(weights.dtype).tiny)).clamp_(max=_LARGEST_WEIGHT)
    mean = parallel.mean_of(weights)
    # Labels that no output moves say nothing of tokens.
    return weights / mean if mean > 0 else torch.ones_like(weights)
