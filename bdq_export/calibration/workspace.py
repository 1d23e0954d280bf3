"""The torch model of a calibration, and which weights it computes with at the moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.candidates import Energies
from bdq_export.calibration.dynamic import LM_HEAD_BITS, DynamicBits, MutableQuantization
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.output_curvature import OutputCurvature, output_curvature
from bdq_export.calibration.output_gradients import label_seeds
from bdq_export.calibration.ranges import Range, observe_ranges
from bdq_export.calibration.sites import Site, block_sites
from bdq_export.calibration.static_activations import static_activations
from bdq_export.calibration.static_cache import observe_heads
from bdq_export.calibration.statistics import InputObserver, InputStatistics
from bdq_export.fake_quant import FakeQuantization, attach
from bdq_export.float_model import ModelDescription, load_float_model, replace_weights
from bdq_export.lazy_weights import LazyWeights
from bdq_export.process_memory import give_back_memory
from bdq_export.progress import Progress
from bdq_export.quantize.correction import FloatInputs
from bdq_export.quantize.grid import FEW_RATIOS, better_grid_kind
from bdq_export.quantize.rtn import rtn
from bdq_export.quantize.sequential import kept, set_quantized
from bdq_export.quantize.specs import SpecOf
from bdq_models import Architecture, Dimensions
from bdq_runtime.packing import QuantizedWeight, QuantSpec
from bdq_runtime.specs import ActivationQuantization, OnlineTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LABEL_SEED = 1299709
"""Apart from the seeds of rotations and signs, which count up from the export's."""
_GRADIENT_TOKENS = 2048
"""Run backwards together: what a block keeps for its gradient is in memory for so many."""
_STATISTICS_TOKENS = 4096
"""Enough for E[x²] of a channel; Hessians take all tokens."""


@dataclass(frozen=True, eq=False)
class Workspace:
    """What the steps of a calibration share.

    Attributes:
        description: config of the model, to make a second one.
        model: the torch model; its weights change from step to step.
        architecture: its family.
        dimensions: its sizes.
        weights: canonical float weights of the untransformed model.
        tokens: calibration tokens `[samples, seq_len]`, this process's part of them.
        spec_of: how the linears of the decoder blocks are quantized.
        progress: shows the stages.
        static: activations are quantized with static ranges, too.
        dynamic: activations or cache are quantized when the model runs, by the `bdq` operators.
        odd_grids: weights may lie on the odd grid, because operators of this project read them.
        quantization: what the model computes with, besides its weights, where that is `dynamic`.
    """

    description: ModelDescription
    model: PreTrainedModel
    architecture: Architecture
    dimensions: Dimensions
    weights: Mapping[str, Tensor]
    tokens: Tensor
    spec_of: SpecOf
    progress: Progress
    static: bool = False
    dynamic: DynamicBits | None = None
    odd_grids: bool = False
    quantization: MutableQuantization = field(default_factory=MutableQuantization)

    @property
    def rotates_online(self) -> bool:
        """Whether a rotation that cannot be folded may run in front of a linear."""
        return self.dynamic is not None and self.dynamic.activations is not None

    @property
    def may_rotate(self) -> bool:
        """Whether activations are quantized and can be rotated, folded or online."""
        return self.rotates_online or (self.static and self.architecture.residual_rotation)

    def install(self, weights: Mapping[str, Tensor], online: Mapping[str, OnlineTransform] | None = None) -> None:
        """Compute with the float `weights` (all of them) after `online` transforms; nothing else is quantized."""
        self.quantization.reset(online or {})
        # Weights of a rotated model untied the config.
        self.model.config.tie_word_embeddings = self.dimensions.tied
        replace_weights(self.model, self.architecture, weights)

    def runner(self) -> BlockRunner:
        """The model's blocks over the calibration tokens."""
        return BlockRunner(self.model, self.architecture.layers, self.tokens)

    def few_runner(self) -> BlockRunner:
        """The same over few of them: enough for energies."""
        return BlockRunner(self.model, self.architecture.layers, self._few())

    def float_inputs(
        self, weights: Mapping[str, Tensor], online: Mapping[str, OnlineTransform] | None = None
    ) -> FloatInputs:
        """A second torch model that goes on computing with the float `weights` (shared, not copied) after `online`."""
        twin = load_float_model(self.description, weights)
        if online:
            attach(twin, self.architecture, self.dimensions, FakeQuantization(online=online))
        return FloatInputs(BlockRunner(twin, self.architecture.layers, self.tokens))

    def curvature(
        self, weights: Mapping[str, Tensor], online: Mapping[str, OnlineTransform], seed: int
    ) -> OutputCurvature:
        """Of the loss of the model with float `weights` after `online`, over the calibration tokens.

        The model computes with `weights` afterwards, without `online`.

        Args:
            weights: canonical ones.
            online: what each linear applies to its input first, by canonical path.
            seed: of the export.
        """
        self.install(weights)
        found = output_curvature(
            BlockRunner(self.model, self.architecture.layers, self.tokens, batch_tokens=_GRADIENT_TOKENS),
            self.architecture,
            self.dimensions,
            online,
            label_seeds(seed + _LABEL_SEED, len(self.tokens)),
            self.progress,
            weights.scratch if isinstance(weights, LazyWeights) else None,
        )
        give_back_memory()
        return found

    def linears(self) -> list[str]:
        """Canonical paths of all linears of the decoder blocks."""
        return [
            self.architecture.layer_path(layer, path)
            for layer in range(self.dimensions.layers)
            for path in self.architecture.linears
        ]

    def statistics(self) -> dict[str, InputStatistics]:
        """Statistics of every linear's inputs, by canonical path, for what the model computes with."""
        runner = self.few_runner()
        hidden = runner.embedded()
        found = {}
        with self.progress.stage("statistics", total=self.dimensions.layers) as stage:
            for layer in range(self.dimensions.layers):
                observer = InputObserver()
                sites = block_sites(self.architecture, self.dimensions, layer)
                hidden = runner.run(layer, hidden, observer, [site.module for site in sites])
                for site in sites:
                    found.update(dict.fromkeys(site.paths, observer.statistics(site.module)))
                stage.advance()
        return found

    def quantize_inputs(self, bits: DynamicBits, rotate_heads: bool) -> None:
        """Quantize the inputs of all linears and the cache without any search."""
        activation, cache = bits.first_activations(), bits.cache(self.rotated_cache(rotate_heads))
        if activation is not None:
            self.quantization.activations.update(dict.fromkeys(self.linears(), activation))
            self.quantize_head(bits)
        if cache is not None:
            self.quantization.kv.update(dict.fromkeys(range(self.dimensions.layers), cache))
        if bits.static_kv is not None:
            self._fix_caches(bits.static_kv)

    def _fix_caches(self, bits: int) -> None:
        """Give every layer a static cache, by what few tokens put into it."""
        runner = self.few_runner()
        hidden = runner.embedded()
        for layer in range(self.dimensions.layers):
            heads, hidden = observe_heads(runner, layer, hidden)
            self.quantization.kv[layer] = heads.quantization(bits, search=True)

    def quantize_head(self, bits: DynamicBits) -> None:
        """Quantize the inputs of lm_head, where those of the blocks are."""
        if bits.activations is not None:
            self.quantization.activations[self.architecture.lm_head] = ActivationQuantization(LM_HEAD_BITS)

    def rotated_cache(self, wanted: bool) -> bool:
        """Whether query and key heads are rotated: where wanted, of a power of two, and with a dynamic cache."""
        size = self.dimensions.head_dim
        return wanted and size & (size - 1) == 0 and not self.has_static_cache

    @property
    def has_static_cache(self) -> bool:
        """Whether channels of the cache have static scales: factors and rotations of keys and queries are no use."""
        return self.dynamic is not None and self.dynamic.static_cache

    def ranges(self) -> dict[str, Range]:
        """Static activation ranges of what the model computes with."""
        return observe_ranges(self.runner(), self.architecture, self.dimensions, self.progress)

    def measure(self, loss: HeldOutLoss) -> float:
        """The held-out loss of what the model computes with, activations quantized if they will be."""
        if not self.static:
            return loss()
        few = replace(self, tokens=self._few())
        with static_activations(self.model, self.architecture, self.dimensions, few.ranges()):
            return loss()

    def _few(self) -> Tensor:
        return self.tokens[: parallel.share(_STATISTICS_TOKENS // self.tokens.shape[1])]

    def round_linears(self, weights: Mapping[str, Tensor], energies: Energies | None) -> dict[str, QuantizedWeight]:
        """Round the linears of `weights` to nearest on searched grids, weighted by the inputs' energies."""
        quantized: dict[str, QuantizedWeight] = {}
        for layer in range(self.dimensions.layers):
            for site in block_sites(self.architecture, self.dimensions, layer):
                importance = None if energies is None else energies[site.paths[0]]
                for spec, paths in self._by_spec(site):
                    names = [f"{path}.weight" for path in paths]
                    if self.odd_grids:
                        spec = better_grid_kind(
                            torch.cat([weights[name] for name in names]), spec, importance, FEW_RATIOS
                        )
                    for name in names:
                        rounded = rtn(weights[name], spec, search=True, importance=importance)
                        quantized.update(kept(weights, {name: rounded}))
        return quantized

    def _by_spec(self, site: Site) -> list[tuple[QuantSpec, list[str]]]:
        """The linears of a site that are quantized alike, and so on one grid."""
        groups: dict[QuantSpec, list[str]] = {}
        for path in site.paths:
            spec = self.spec_of(path)
            if spec is not None:
                groups.setdefault(spec, []).append(path)
        return list(groups.items())

    def set_quantized(self, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Compute with the values of `quantized`."""
        set_quantized(self.model, self.architecture, quantized)


def round_ends(weights: Mapping[str, Tensor], specs: Mapping[str, QuantSpec]) -> dict[str, QuantizedWeight]:
    """Embedding and lm_head, rounded to nearest: 8 bits lose nothing, below that the grid is searched."""
    rounded = {name: rtn(weights[name], spec, search=spec.bits < 8) for name, spec in specs.items()}
    return kept(weights, rounded)
