"""GPTQ through a whole model: every linear sees the inputs that the already quantized ones before it produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.output_curvature import OutputCurvature
from bdq_export.calibration.sites import Site, block_sites
from bdq_export.calibration.statistics import InputObserver
from bdq_export.float_model import replace_weights
from bdq_export.lazy_weights import LazyWeights
from bdq_export.process_memory import give_back_memory
from bdq_export.progress import Progress
from bdq_export.quantize.correction import FloatInputs, GapObserver
from bdq_export.quantize.gptq import GptqOptions, gptq
from bdq_export.quantize.grid import Grid, better_grid_kind
from bdq_export.quantize.specs import SpecOf
from bdq_models import Architecture, Dimensions
from bdq_runtime.packing import Array, QuantizedWeight, QuantSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Prepare = Callable[[BlockRunner, Site, Tensor, Mapping[str, Tensor]], None]
BeforeBlock = Callable[[BlockRunner, int, Tensor], None]


@dataclass
class SequentialResult:
    """What quantizing the decoder blocks gave.

    Attributes:
        quantized: canonical weight name -> quantized weight.
        fallbacks: canonical weight name -> why GPTQ was not possible and the weight was rounded to nearest.
        flatness: module of each site -> flatness of its inputs.
    """

    quantized: dict[str, QuantizedWeight] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    flatness: dict[str, float] = field(default_factory=dict)

    def update(self, other: SequentialResult) -> None:
        """Add what another part of the model gave."""
        self.quantized.update(other.quantized)
        self.fallbacks.update(other.fallbacks)
        self.flatness.update(other.flatness)


class Journal(Protocol):
    """Remembers blocks, so that a run that was ended goes on where it was."""

    def restored(self, layer: int) -> SequentialResult | None:
        """What quantizing block `layer` gave, with all that was decided beside it in place; None: it is to be done."""

    def finished(self, layer: int, done: SequentialResult) -> None:
        """Keep what quantizing block `layer` gave."""


def quantize_blocks(
    runner: BlockRunner,
    architecture: Architecture,
    dimensions: Dimensions,
    weights: Mapping[str, Tensor],
    spec_of: SpecOf,
    progress: Progress,
    options: GptqOptions | None = None,
    floats: FloatInputs | None = None,
    layers: int | None = None,
    stage_name: str = "gptq",
    prepare: Prepare | None = None,
    odd_grids: bool = False,
    before_block: BeforeBlock | None = None,
    journal: Journal | None = None,
    grids: Mapping[str, Grid] | None = None,
    curvature: OutputCurvature | None = None,
) -> SequentialResult:
    """Quantize all linears of the decoder blocks, in execution order; the model computes with the result afterwards.

    Args:
        runner: of a model that computes with `weights`.
        architecture: its family.
        dimensions: its sizes.
        weights: canonical weights; left as they are.
        spec_of: how each linear is quantized.
        progress: shows a stage with a step for each block.
        options: of GPTQ.
        floats: the float model's inputs, to make up for errors of the blocks before; None aims at the float weights.
        layers: how many blocks, from the first one; None is all.
        stage_name: under which the progress shows.
        prepare: called with the runner, each site, its block's inputs and the float weights before the site's linears
            are quantized: what it does to their inputs is what their Hessian sees.
        odd_grids: put a site's weights on the odd grid where that fits them better.
        before_block: called with the runner, the index of each block and its inputs before the block's sites; may
            change `weights` of that block.
        journal: has the results of blocks that need not be done again, and gets those of the others.
        grids: canonical weight name -> grid to round to, looked up at each site; others are searched.
        curvature: of the float model's loss by the outputs of all linears, over the runner's tokens; None takes all
            outputs and tokens for equally important. Together with `floats` tokens are: the correction needs all of
            them (few of them, weighted, made 0.01 nats of a tiny model 23).
    """
    result = SequentialResult()
    hidden = runner.embedded()
    count = dimensions.layers if layers is None else min(layers, dimensions.layers)
    with progress.stage(stage_name, total=count) as stage:
        for layer in range(count):
            sites = block_sites(architecture, dimensions, layer)
            done = None if journal is None else journal.restored(layer)
            restored = done is not None
            if done is None:
                done = SequentialResult()
                if before_block is not None:
                    before_block(runner, layer, hidden)
            else:
                set_quantized(runner.model, architecture, done.quantized)
            if floats is not None:
                floats.advance(layer, sites)
            for site in () if restored else sites:
                if prepare is not None:
                    prepare(runner, site, hidden, weights)
                if floats is None:
                    token_weights = None if curvature is None else curvature.weights[site.module]
                    observer = InputObserver(hessians=True, weights=token_weights)
                else:
                    observer = floats.observer(site.module)
                runner.run(layer, hidden, observer, (site.module,), stop=True)
                done.flatness[site.module] = observer.statistics(site.module).flatness
                quantized = _quantize_site(
                    site, observer, weights, spec_of, options, done, odd_grids, grids or {}, curvature
                )
                set_quantized(runner.model, architecture, quantized)
                done.quantized.update(quantized)
            if journal is not None and not restored:
                journal.finished(layer, done)
            if isinstance(weights, LazyWeights):
                done.quantized = kept(weights, done.quantized)
                set_quantized(runner.model, architecture, done.quantized)
            result.update(done)
            hidden = runner.run(layer, hidden)
            # Hessians come and go in sizes that the allocator keeps for later: a gigabyte after thirty blocks.
            give_back_memory()
            stage.advance()
    return result


def round_blocks(
    runner: BlockRunner,
    architecture: Architecture,
    dimensions: Dimensions,
    weights: Mapping[str, Tensor],
    quantized: Mapping[str, QuantizedWeight],
    progress: Progress,
    prepare: Prepare,
) -> None:
    """Put weights that were rounded before in place block by block, with `prepare` called for each site on the way.

    Arguments as those of `quantize_blocks`; `quantized` by canonical name.
    """
    hidden = runner.embedded()
    with progress.stage("round weights", total=dimensions.layers) as stage:
        for layer in range(dimensions.layers):
            for site in block_sites(architecture, dimensions, layer):
                prepare(runner, site, hidden, weights)
                names = [f"{path}.weight" for path in site.paths]
                set_quantized(
                    runner.model, architecture, {name: quantized[name] for name in names if name in quantized}
                )
            hidden = runner.run(layer, hidden)
            stage.advance()


def set_quantized(model: PreTrainedModel, architecture: Architecture, quantized: Mapping[str, QuantizedWeight]) -> None:
    """Let `model` compute with the values of quantized weights."""
    if quantized:
        replace_weights(model, architecture, _Values(quantized))


class _Values(Mapping[str, Tensor]):
    """Values of quantized weights, made each time they are read."""

    def __init__(self, quantized: Mapping[str, QuantizedWeight]) -> None:
        self._quantized = dict(quantized)

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._quantized[name].dequantize())

    def __contains__(self, name: object) -> bool:
        return name in self._quantized

    def __iter__(self) -> Iterator[str]:
        return iter(self._quantized)

    def __len__(self) -> int:
        return len(self._quantized)


def kept(weights: Mapping[str, Tensor], quantized: Mapping[str, QuantizedWeight]) -> dict[str, QuantizedWeight]:
    """`quantized`, with its arrays on the disk where the float `weights` it was made of are lazy."""
    if not isinstance(weights, LazyWeights):
        return dict(quantized)
    keep = weights.scratch.keep
    return {
        name: replace(
            weight,
            codes=keep(weight.codes),
            scales=keep(weight.scales),
            zero_points=None if weight.zero_points is None else keep(weight.zero_points),
        )
        for name, weight in quantized.items()
    }


def split_rows_of(weight: QuantizedWeight, counts: Mapping[str, int]) -> dict[str, QuantizedWeight]:
    """Undo stacking: the rows of `weight`, `counts[name]` for each name in turn."""
    parts = {}
    start = 0
    for name, count in counts.items():
        rows = slice(start, start + count)
        zeros = None if weight.zero_points is None else weight.zero_points[rows]
        parts[name] = QuantizedWeight(weight.codes[rows], weight.scales[rows], zeros, weight.spec)
        start += count
    return parts


def _all_rows(weight: QuantizedWeight) -> QuantizedWeight:
    """The weight whose rows the processes share."""

    def gathered(part: Array) -> Array:
        rows: Array = parallel.unshard(torch.from_numpy(part)).numpy()
        return rows

    zeros = None if weight.zero_points is None else gathered(weight.zero_points)
    return QuantizedWeight(gathered(weight.codes), gathered(weight.scales), zeros, weight.spec)


def _stacked(grids: Sequence[Grid]) -> Grid:
    """The grid of stacked weights."""
    scales, zeros = (torch.cat([getattr(grid, name) for grid in grids]) for name in ("scales", "zero_points"))
    return Grid(scales, zeros, grids[0].spec)


def _quantize_site(
    site: Site,
    observer: InputObserver,
    weights: Mapping[str, Tensor],
    spec_of: SpecOf,
    options: GptqOptions | None,
    result: SequentialResult,
    odd_grids: bool,
    grids: Mapping[str, Grid],
    curvature: OutputCurvature | None,
) -> dict[str, QuantizedWeight]:
    """Quantize the linears of a site, those of one spec stacked: they share the Hessian, and so its factor."""
    hessian = observer.statistics(site.module).hessian
    assert hessian is not None, "observed with Hessians"
    groups: dict[QuantSpec, list[str]] = {}
    for path in site.paths:
        spec = spec_of(path)
        if spec is not None:
            groups.setdefault(spec, []).append(f"{path}.weight")
    quantized: dict[str, QuantizedWeight] = {}
    for spec, names in groups.items():
        stacked = torch.cat([weights[name] for name in names])
        if isinstance(observer, GapObserver):
            stacked = observer.corrected(stacked, hessian)
        grid = _stacked([grids[name] for name in names]) if all(name in grids for name in names) else None
        if grid is not None:
            spec = grid.spec
        elif odd_grids:
            spec = better_grid_kind(stacked, spec, hessian.diagonal())
            spec = replace(spec, grid=(parallel.from_first(spec.grid.encode()) or b"").decode())
        coupled: list[Tensor] = []
        if curvature is not None:
            for name in names:
                coupled += curvature.factors(name.removesuffix(".weight"))
        if coupled:  # a linear is one group as a rule: every process rounds it
            done = gptq(stacked, hessian, spec, options, grid, coupled)
            rows = done.weight
        else:  # rows are independent of each other: every process rounds its part
            if grid is not None:
                grid = Grid(parallel.shard(grid.scales), parallel.shard(grid.zero_points), spec)
            done = gptq(parallel.shard(stacked), hessian, spec, options, grid)
            rows = _all_rows(done.weight)
        quantized.update(split_rows_of(rows, {name: weights[name].shape[0] for name in names}))
        if done.fallback is not None:
            result.fallbacks.update(dict.fromkeys(names, done.fallback))
    return quantized
