"""Which site gets how many bits: what rounding it costs, predicted from gradients, and the cheapest choice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.output_gradients import SiteGradients, label_seeds, site_gradients
from bdq_export.calibration.selection import Transformed
from bdq_export.calibration.workspace import Workspace
from bdq_export.options import ExportOptions
from bdq_export.quantize.bit_allocation import allocate
from bdq_export.quantize.grid import FEW_RATIOS, better_grid_kind
from bdq_export.quantize.rtn import rtn
from bdq_export.quantize.specs import SpecOf, linear_specs
from bdq_export.quantize.target_bits import GRADIENT_TOKENS, BitGroup, bit_budget
from bdq_export.report.report import BitChoice, SiteBits

logger = logging.getLogger(__name__)

EVERY = 4
"""One of so many rows of a weight is rounded to predict its loss, which is a sum over rows; 1 is all."""
_SEED = 104729
"""Apart from the seeds of rotations and signs, which count up from the export's."""


@dataclass(frozen=True)
class ChosenBits:
    """What was chosen.

    Attributes:
        bits: canonical path of each linear that was free -> its bits.
        choice: the same with its reasons, for the report.
    """

    bits: Mapping[str, int]
    choice: BitChoice


def choose_bits(space: Workspace, candidate: Transformed, options: ExportOptions) -> ChosenBits:
    """The bits of each site at which the predicted losses add up to least within `options.target_bits`.

    The loss of a site is the KL(float ‖ quantized) of the next-token distributions when only that site is rounded, to
    second order and with errors of different channels and tokens taken as independent: half the mean over tokens of
    `Σ_n (g_n δy_n)²`, with δy the error of the site's outputs and g the gradient of the log-likelihood of labels drawn
    from the model (see `output_gradients`). Activations and cache are float here: what their rounding costs does not
    depend on the weights' bits much.

    Args:
        space: the model; computes with the folded float weights of `candidate`, without its online transforms,
            afterwards.
        candidate: the transforms.
        options: with a `target_bits`.
    """
    assert options.target_bits is not None, "the caller asks only where bits are to be chosen"
    budget = bit_budget(options, space.architecture, space.dimensions)
    space.install(candidate.weights)
    tokens = space.tokens[: parallel.share(GRADIENT_TOKENS // space.tokens.shape[1])]
    runner = BlockRunner(space.model, space.architecture.layers, tokens)
    by_module = {group.site.module: group for group in budget.groups}
    losses: dict[str, dict[int, float]] = {}
    with space.progress.stage("choose bits", total=space.dimensions.layers) as stage:
        seeds = label_seeds(options.seed + _SEED, len(tokens))
        for parts in site_gradients(runner, space.architecture, space.dimensions, candidate.online, seeds):
            (sites,) = parts  # so few tokens are one batch
            for seen in sites:
                group = by_module.get(seen.site.module)
                if group is not None:
                    losses[seen.site.module] = {
                        bits: _loss(seen, group, candidate.weights, _spec_of(options, group, bits), space.odd_grids)
                        for bits in budget.choices
                    }
            stage.advance()
    sizes = [group.weights for group in budget.groups]
    costs = [losses[group.site.module] for group in budget.groups]
    found = allocate(sizes, costs, budget.left(options.target_bits))
    used = budget.kept_bits + sum(size * bits for size, bits in zip(sizes, found, strict=True))
    rows = tuple(
        SiteBits(group.site.layer, group.site.module, group.paths, group.weights, bits, cost)
        for group, bits, cost in zip(budget.groups, found, costs, strict=True)
    )
    choice = BitChoice(options.target_bits, used / budget.total, rows, dict(budget.kept))
    logger.info("bits: %.3f on average, predicted loss %.4f", choice.average, choice.predicted_loss)
    return ChosenBits(
        {path: bits for group, bits in zip(budget.groups, found, strict=True) for path in group.paths}, choice
    )


def _spec_of(options: ExportOptions, group: BitGroup, bits: int) -> SpecOf:
    return linear_specs(options, dict.fromkeys(group.paths, bits))


def _loss(
    seen: SiteGradients, group: BitGroup, weights: Mapping[str, Tensor], spec_of: SpecOf, odd_grids: bool
) -> float:
    """Predicted KL, in nats a token, when the linears of `group` are rounded to nearest on searched grids."""
    importance, count = seen.inputs.square().sum(0), torch.tensor(len(seen.inputs))
    parallel.add_up(importance, count)
    importance /= count
    spec = spec_of(group.paths[0])
    assert spec is not None, "what is chosen is quantized"
    rows = {path: weights[f"{path}.weight"][::EVERY] for path in group.paths}
    if odd_grids:
        spec = better_grid_kind(torch.cat(list(rows.values())), spec, importance, FEW_RATIOS)
    total = 0.0
    for path, some in rows.items():
        rounded = torch.from_numpy(rtn(some, spec, search=spec.bits < 8, importance=importance).dequantize())
        change = (seen.inputs @ (rounded - some).t()).mul_(seen.gradients[path][:, ::EVERY])
        share = some.shape[0] / seen.gradients[path].shape[1]
        total += parallel.mean_of(change.square_().sum(-1)) / (2 * share)
    return total
