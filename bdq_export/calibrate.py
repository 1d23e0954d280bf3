"""Calibration: from a float model to transforms, quantized weights and activation ranges.

    tokens -> statistics -> candidates, measured -> fold the best -> curvature of the loss -> GPTQ block by block
    -> measure -> keep or go back
    -> learn scales around the codes end to end, where the options say so

`--transform none --weights rtn` needs none of it and runs no calibration forward.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.bit_choice import ChosenBits, choose_bits
from bdq_export.calibration.candidates import ROTATED, Energies, Statistics
from bdq_export.calibration.clip_tuning import ClipTuning
from bdq_export.calibration.dynamic import DynamicBits
from bdq_export.calibration.learned_blocks import LearnedBlocks
from bdq_export.calibration.learned_scales import LearnedScales, learn_scales, tuning_options
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.output_curvature import OutputCurvature
from bdq_export.calibration.output_groups import GPTQ_SEQUENCES
from bdq_export.calibration.ranges import Range
from bdq_export.calibration.result import CalibrationResult
from bdq_export.calibration.selection import (
    NONE,
    Measured,
    Transformed,
    choose,
    measure_rounded,
    names_to_try,
    refolded,
    transformed,
)
from bdq_export.calibration.shared_tokens import own_tokens, shared_tokens
from bdq_export.calibration.site_flatness import activation_flatness, weight_flatness
from bdq_export.calibration.uncalibrated import uncalibrated
from bdq_export.calibration.workspace import Workspace, round_ends
from bdq_export.fake_quant import attach
from bdq_export.learning.block_stage import BlockOptions, flatquant_options
from bdq_export.options import BDQ, KRONECKER, ExportOptions
from bdq_export.process_memory import give_back_memory
from bdq_export.progress import Progress
from bdq_export.quantize.sequential import quantize_blocks, round_blocks
from bdq_export.quantize.specs import end_specs, linear_specs
from bdq_export.report.report import BitChoice, Candidate
from bdq_export.resume import NOWHERE, ProgressStore
from bdq_export.resume.block_journal import BlockJournal
from bdq_export.resume.choices import ChosenTransform, bits_from, bits_record
from bdq_export.transform import Transforms
from bdq_runtime.packing import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bdq_export.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

_HELD_OUT_SHARE = 8
"""One of so many calibration sequences is held out, at least two where there are four."""
_OBVIOUSLY = 0.7
"""Where inputs are rounded, too, a transform whose loss is below this part of the loss without one needs no check."""


def calibrate(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    options: ExportOptions,
    progress: Progress,
    store: ProgressStore = NOWHERE,
) -> CalibrationResult:
    """Find transforms and quantize all weights.

    Args:
        checkpoint: family, sizes and tokenizer.
        model: the torch model over `weights`; computes with them again when this returns.
        weights: canonical float weights; left as they are.
        options: of the export.
        progress: shows the stages.
        store: keeps what is finished and has what was finished before; the result is the same to the last bit.

    Raises:
        InvalidInputError: a calibration file that cannot be used.
        UsageError: `keep` asks for different bits of tied weights.
    """
    end_specs(options, checkpoint.architecture, checkpoint.dimensions, checkpoint.dimensions.tied)
    dynamic = DynamicBits.of(options)
    if not options.calibrates:
        return uncalibrated(checkpoint, model, weights, options, progress)
    tokens = shared_tokens(checkpoint, model, options, progress, store)
    held = max(1, tokens.shape[0] // _HELD_OUT_SHARE)
    space = Workspace(
        checkpoint,
        model,
        checkpoint.architecture,
        checkpoint.dimensions,
        weights,
        own_tokens(tokens[:-held]),
        linear_specs(options),
        progress,
        static=options.is_static,
        dynamic=dynamic,
        odd_grids=options.linear_ops == BDQ,
    )
    # What chooses does not judge: the last sequences are left to the verification of the written file.
    judged = tokens[-held:]
    chooses, held_back = (judged, judged) if held < 2 else (judged[: held // 2], judged[held // 2 :])
    loss = HeldOutLoss(model, space.architecture.layers, parallel.shard(chooses))
    detach = attach(model, space.architecture, space.dimensions, space.quantization.view)
    try:
        return _Calibration(space, options, loss, chooses, held_back, store).run()
    finally:
        detach()
        space.install(weights)


@dataclass(frozen=True, eq=False)
class _Quantized:
    """A transformed model after its weights were quantized.

    Attributes:
        candidate: with what the block-wise stage learned.
        weights: canonical name -> quantized weight.
        loss: held-out loss.
    """

    candidate: Transformed
    weights: Mapping[str, QuantizedWeight]
    loss: float


class _Calibration:
    """One calibration with measured candidates."""

    def __init__(
        self,
        space: Workspace,
        options: ExportOptions,
        loss: HeldOutLoss,
        chooses: Tensor,
        held_back: Tensor,
        store: ProgressStore,
    ) -> None:
        self.space, self.options, self.loss = space, options, loss
        self.chooses, self.held_back, self.store = chooses, held_back, store
        self.measured: list[Measured] = []
        self.warnings: list[str] = []
        self.flatness: dict[str, float] = {}
        self.bits: BitChoice | None = None

    def run(self) -> CalibrationResult:
        statistics: Statistics = self.space.statistics()
        bits = None if self.space.dynamic is None else self.space.dynamic.activations
        names = names_to_try(self.options.transform, self.space.may_rotate, bits)
        best, reason = self._chosen(names, statistics)
        self._warn_of_parts(best)
        if self._to_check(best):
            # Without its weights, which are folded again: those of two models need not be in memory at once.
            name, transforms, energies = best.name, best.transforms, best.energies
            del best
            found, reason = self._better(name, transforms, energies, reason, statistics)
        else:
            found = self._quantize(best)
        learned = None
        if self.options.learns:
            found, learned = self._learned(found)
        return replace(self._result(found, reason, statistics), learned=learned)

    def _chosen(self, names: tuple[str, ...], statistics: Statistics) -> tuple[Transformed, str]:
        """The transform to quantize with, and why."""
        found = self.store.load("transform", ChosenTransform.of)
        if found is not None:
            self.measured = list(found.measured)
            return refolded(self.space, found.name, found.transforms, found.energies), found.reason
        best, reason = self._select(names, statistics)
        chosen = ChosenTransform(best.name, reason, tuple(self.measured), best.transforms, best.energies)
        self.store.save("transform", chosen.record())
        return best, reason

    def _to_check(self, best: Transformed) -> bool:
        """Whether a transform that won rounded to nearest must win with GPTQ, too."""
        if self.options.transform != "auto" or best.name == NONE or self.options.weights != "gptq":
            return False
        losses = {measured.name: measured.loss for measured in self.measured}
        return self.space.dynamic is None or losses[best.name] >= _OBVIOUSLY * losses[NONE]

    def _learned(self, found: _Quantized) -> tuple[_Quantized, LearnedScales]:
        """After the end-to-end stage."""
        tuning = tuning_options(self.options)
        candidate, weights, learned = learn_scales(
            self.space, found.candidate, found.weights, self.loss, found.loss, self.chooses, tuning, self.store
        )
        return _Quantized(candidate, weights, min(learned.before, learned.after)), learned

    def _better(
        self, name: str, transforms: Transforms, energies: Energies, reason: str, statistics: Statistics
    ) -> tuple[_Quantized, str]:
        """The whole GPTQ with candidate `name` and without a transform, whichever loses less on held-out tokens.

        With activations of 8 or more bits the two are close, and a quick GPTQ of a few blocks misjudges them: on
        SmolLM2-135M it preferred `bdq`, 0.040 to 0.047 nats, where the whole one loses 0.129 to 0.103.
        """
        plain = self._quantize(transformed(self.space, NONE, statistics, self.options.seed), "gptq without a transform")
        activations, kv = dict(self.space.quantization.activations), dict(self.space.quantization.kv)
        self.space.install(self.space.weights)  # drops the dequantized ones
        give_back_memory()
        best = refolded(self.space, name, transforms, energies)
        flatness, self.flatness = self.flatness, {}
        bits = self.bits
        warnings, self.warnings = self.warnings, []
        found = self._quantize(best)
        both = f"with GPTQ {found.loss:.4f} nats, {plain.loss:.4f} without a transform"
        if found.loss < plain.loss:
            return found, f"{reason}; {both}"
        self.flatness, self.warnings, self.bits = flatness, warnings, bits
        self.space.install(plain.candidate.weights, plain.candidate.online)
        self.space.set_quantized(plain.weights)
        self.space.quantization.activations.update(activations)
        self.space.quantization.kv.update(kv)
        return plain, f"{name} is better rounded to nearest, but not with GPTQ: {both}"

    def _tuning(self, candidate: Transformed) -> ClipTuning | None:
        """What quantizes the inputs of each site, where the scheme does."""
        space = self.space
        if space.dynamic is None:
            return None
        cache = space.dynamic.cache(space.rotated_cache(candidate.rotates_heads))
        bits, clip = space.dynamic.activations, self.options.activation_clip
        return ClipTuning(space.architecture, space.quantization, bits, cache, clip, space.dynamic.static_kv)

    def _select(self, names: tuple[str, ...], statistics: Statistics) -> tuple[Transformed, str]:
        if len(names) == 1:
            only = transformed(self.space, names[0], statistics, self.options.seed, self.loss)
            return only, f"transform {only.name} was asked for{only.learned}"
        with self.space.progress.stage("choose transform", total=len(names)) as stage:
            for name in names:
                candidate = transformed(self.space, name, statistics, self.options.seed)
                measured = measure_rounded(self.space, candidate, self.loss)
                self.measured.append(measured)
                del candidate
                logger.info("transform %s: held-out loss %.4f", name, measured.loss)
                stage.advance()
        name, reason = choose(self.measured, self.space.dimensions.tied)
        chosen = next(measured for measured in self.measured if measured.name == name)
        return refolded(self.space, name, chosen.transforms, chosen.energies), reason

    def _warn_of_parts(self, found: Transformed) -> None:
        """Say so where a transform lacks a part that its name promises."""
        if found.name in ROTATED and found.transforms.residual_rotation is None:
            self.warnings.append(
                f"transform {found.name} has no residual rotation here: norms of {self.space.architecture.name} do not "
                "commute with one"
            )

    def _quantize(self, candidate: Transformed, stage: str = "gptq") -> _Quantized:
        """Quantize everything for good; the model computes with it afterwards."""
        if self.options.target_bits is not None:
            chosen = self._bits(candidate, stage)
            self.bits = chosen.choice
            self.space = replace(self.space, spec_of=linear_specs(self.options, chosen.bits))
        space, architecture = self.space, self.space.architecture
        curvature = self._curvature(candidate)
        space.install(candidate.weights, candidate.online)
        tied = f"{architecture.lm_head}.weight" not in candidate.weights
        quantized = round_ends(candidate.weights, end_specs(self.options, architecture, space.dimensions, tied))
        space.set_quantized(quantized)
        tuning = self._tuning(candidate)
        if self.options.weights == "gptq":
            few = self._few()
            blocks = self._learned_blocks(few, candidate)
            if curvature is not None and blocks is not None:
                curvature = replace(curvature, output_scales=blocks.output_scales)
            if tuning is not None and blocks is not None:
                tuning = replace(tuning, learned=blocks.found)
            parts = {"clips": tuning, "learned": blocks}
            done = quantize_blocks(
                few.runner(),
                architecture,
                space.dimensions,
                candidate.weights if blocks is None else blocks.weights,
                space.spec_of,
                space.progress,
                # Inputs of few bits are too noisy to tell where the float ones would be (SmolLM2-135M, w4a4kv4, first 8
                # blocks: 0.126 nats with this correction, 0.098 without).
                floats=None if space.rotates_online else few.float_inputs(candidate.weights),
                prepare=None if tuning is None else tuning.prepare,
                odd_grids=space.odd_grids,
                stage_name=stage,
                before_block=None if blocks is None else blocks.learn,
                grids=None if blocks is None else blocks.found.grids,
                curvature=curvature,
                journal=BlockJournal(
                    self.store, stage, {name: part for name, part in parts.items() if part is not None}
                ),
            )
            candidate = candidate if blocks is None else blocks.candidate
            quantized.update(done.quantized)
            self.flatness = done.flatness
            self.warnings += [f"{name}: {reason}" for name, reason in done.fallbacks.items()]
        else:
            quantized.update(self._rounded(candidate, tuning))
            if self._learns_blocks(candidate):
                self.warnings.append(
                    "--weights rtn leaves out the block-wise stage of --effort best, which goes with GPTQ; scales are "
                    "learned end to end"
                )
        if tuning is not None:
            self.flatness.update(tuning.flatness)
        if space.dynamic is not None:
            space.quantize_head(space.dynamic)
        loss = space.measure(self.loss)
        logger.info("%s: held-out loss %.4f", stage, loss)
        return _Quantized(candidate, quantized, loss)

    def _learned_blocks(self, space: Workspace, candidate: Transformed) -> LearnedBlocks | None:
        """The block-wise stage: FlatQuant's, or ours where the effort is best and no rotation is shared by blocks."""
        if not self._learns_blocks(candidate):
            return None
        if parallel.total(len(space.tokens))[0] < 2:
            self.warnings.append(
                "one calibration sequence is left to learn blocks from, and judges them, too; give more "
                "--calib-samples, or a longer text"
            )
        if candidate.name == KRONECKER:
            return LearnedBlocks(self.space, candidate, flatquant_options(self.options.seed), float_inputs=True)
        return LearnedBlocks(space, candidate, BlockOptions(seed=self.options.seed))

    def _learns_blocks(self, candidate: Transformed) -> bool:
        if candidate.name == KRONECKER:
            return True
        learns = self.options.learns and self.options.effort == "best" and self.space.rotates_online
        return learns and candidate.transforms.residual_rotation is None

    def _few(self) -> Workspace:
        """The same with the tokens of GPTQ."""
        return replace(self.space, tokens=self.space.tokens[: parallel.share(GPTQ_SEQUENCES)])

    def _curvature(self, candidate: Transformed) -> OutputCurvature | None:
        """Of `candidate` over the tokens of GPTQ; None where not asked for or learned matrices change outputs."""
        if not self.options.weighs_outputs or candidate.name == KRONECKER:
            return None
        return self._few().curvature(candidate.weights, candidate.online, self.options.seed)

    def _bits(self, candidate: Transformed, stage: str) -> ChosenBits:
        name = f"{stage.replace(' ', '-')}-bits"
        found = self.store.load(name, bits_from)
        if found is None:
            found = choose_bits(self.space, candidate, self.options)
            self.store.save(name, bits_record(found))
        return found

    def _rounded(self, candidate: Transformed, tuning: ClipTuning | None) -> dict[str, QuantizedWeight]:
        space = self.space
        rounded = space.round_linears(candidate.weights, candidate.energies)
        if tuning is None:
            space.set_quantized(rounded)
        else:
            few, prepare = space.few_runner(), tuning.prepare
            round_blocks(few, space.architecture, space.dimensions, candidate.weights, rounded, space.progress, prepare)
        return rounded

    def _result(self, found: _Quantized, reason: str, statistics: Statistics) -> CalibrationResult:
        space, best = self.space, found.candidate
        ranges: Mapping[str, Range] = {}
        if space.static:
            ranges = space.ranges()
        candidates = [Candidate(each.name, each.loss, each.name == best.name) for each in self.measured]
        return CalibrationResult(
            transform=best.name,
            reason=reason,
            transforms=best.transforms,
            weights=best.weights,
            quantized=found.weights,
            held_back=self.held_back,
            activation_ranges=ranges,
            activations=dict(space.quantization.activations),
            online=dict(best.online),
            kv=dict(space.quantization.kv),
            candidates=tuple(candidates),
            loss=found.loss,
            activation_flatness=activation_flatness(space, statistics, self.flatness),
            weight_flatness=weight_flatness(space, best.weights),
            bits=self.bits,
            warnings=tuple(self.warnings),
        )
