"""The block-wise learned stage inside of GPTQ: each block's transforms are improved right before it is rounded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.learned_clips import LearnedClips
from bdq_export.calibration.selection import Transformed
from bdq_export.calibration.workspace import Workspace
from bdq_export.float_model import load_float_model, replace_weights
from bdq_export.lazy_weights import LazyWeights
from bdq_export.learning.block_parameters import block_parameters, learned_transforms
from bdq_export.learning.block_stage import BlockOptions, BlockResult, learn_block
from bdq_export.learning.block_student import BlockStudent
from bdq_export.options import KRONECKER
from bdq_export.resume.codecs import transforms_from, transforms_record
from bdq_export.resume.record import Record, merged
from bdq_export.scratch import Scratch
from bdq_export.streamed_blocks import load_block
from bdq_export.transform import Transforms, fold, online_by_path
from bdq_export.transform.output_scales import output_scales
from bdq_runtime.packing import ODD, QuantSpec

logger = logging.getLogger(__name__)

Part = TypeVar("Part")

_LEAST_GAIN = 0.01
"""Share of a block's held-out error that must go away: less may be chance, and costs reproducible closed forms."""
_FIRST_CACHE_CLIP = 0.95


@dataclass
class LearnedBlocks:
    """Called for each block before its sites are quantized; keeps the transforms and weights as they come to be.

    Attributes:
        space: of the calibration; computes with `candidate` and quantizes nothing of the block yet.
        candidate: transforms and folded weights; replaced by better ones block by block.
        options: of the stage.
        float_inputs: learn from the float model's inputs of a block, as FlatQuant does, not from those that the
            quantized blocks before it give; and keep the clips and grids that were learned (`found`).
        results: of the blocks so far.
        found: what was learned beside the transforms of the last block, where `float_inputs` says so.
        output_scales: canonical path of a linear -> what its outputs `[N]` are multiplied with since the start, where
            only diagonals are learned.
    """

    space: Workspace
    candidate: Transformed
    options: BlockOptions
    float_inputs: bool = False
    results: list[BlockResult] = field(default_factory=list)
    found: LearnedClips = field(default_factory=LearnedClips)
    output_scales: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        space = self.space
        self._start = self.candidate.transforms
        twin = load_float_model(space.description, space.weights)
        self._floats = BlockRunner(twin, space.architecture.layers, space.tokens)
        self._given = self._expected = self._floats.embedded()
        self._next = 0
        self._folded: set[int] = set()
        self._held = dict[str, Tensor]()
        self.weights: Mapping[str, Tensor] = self._held
        if isinstance(space.weights, LazyWeights):
            self.weights = _Current(self, space.weights)
        else:
            self._held.update(self.candidate.weights)

    def learn(self, runner: BlockRunner, layer: int, hidden: Tensor) -> None:
        """Improve block `layer`; `weights` and what the model computes with are new afterwards.

        Args:
            runner: of the model with the blocks before quantized.
            layer: index of the block.
            hidden: its inputs, all calibration tokens.
        """
        self._advance(layer)
        space, candidate = self.space, self.candidate
        bits = space.dynamic
        activation = None if bits is None else bits.first_activations()
        cache = None if bits is None else bits.cache(space.rotated_cache(candidate.rotates_heads))
        if cache is not None:
            cache = replace(cache, key_clip=_FIRST_CACHE_CLIP, value_clip=_FIRST_CACHE_CLIP)
        parameters = block_parameters(
            space.architecture, space.dimensions, layer, candidate.transforms, activation, cache
        )
        student = BlockStudent(
            space.architecture,
            space.dimensions,
            layer,
            candidate.transforms,
            self.weights,
            self._spec_of,
            parameters,
            activation,
            cache,
        )
        load_block(runner.model, layer)
        # Its own hooks quantize: the model's must not, and they come back with the sites of this block.
        online = dict(space.quantization.online)
        space.quantization.online.clear()
        given = self._given if self.float_inputs else hidden
        result = learn_block(runner, student, given, self._expected, self.options)
        space.quantization.online.update(online)
        self.results.append(result)
        logger.info("block %d: held-out error %.4f, %.4f before", layer, result.after, result.before)
        if result.after < result.before * (1 - _LEAST_GAIN):
            self._fold(
                layer,
                learned_transforms(space.architecture, space.dimensions, layer, candidate.transforms, parameters),
            )
            if self.float_inputs:
                self.found.keep(student, self.weights)

    def state_of(self, layer: int) -> Record:
        """What was learned of a block, for `resume.BlockJournal`."""
        result, transforms = self.results[layer], _of_layer(self.candidate.transforms, layer)
        values = Record({"before": result.before, "after": result.after, "folded": layer in self._folded})
        return merged({"result": values, "transforms": transforms_record(transforms)})

    def restore(self, layer: int, record: Record) -> None:
        """Be as after `learn` of a block, as `state_of` recorded it."""
        values, transforms = record.part("result").values, transforms_from(record.part("transforms"))
        result, folded = BlockResult(values["before"], values["after"]), bool(values["folded"])
        self._advance(layer)
        self.results.append(result)
        if folded:
            now = self.candidate.transforms
            self._fold(
                layer,
                replace(
                    now,
                    diagonals={**now.diagonals, **transforms.diagonals},
                    diagonals_before={**now.diagonals_before, **transforms.diagonals_before},
                    online={**now.online, **transforms.online},
                    head_rotations={**now.head_rotations, **transforms.head_rotations},
                ),
            )

    def _advance(self, layer: int) -> None:
        """Run the float block; after a record that could not be restored, what it left is forgotten."""
        del self.results[layer:]
        self.found.forget()
        if layer == self._next:
            self._given = self._expected
            self._expected = self._floats.run(layer, self._given)
            self._next += 1

    def _spec_of(self, path: str) -> QuantSpec | None:
        spec = self.space.spec_of(path)
        if spec is None or not self.space.odd_grids or spec.bits == 8:
            return spec
        return replace(spec, grid=ODD)

    def _fold(self, layer: int, transforms: Transforms) -> None:
        """Fold `transforms` into block `layer` again, from the untransformed weights."""
        space = self.space
        self._folded.add(layer)
        if self.candidate.name != KRONECKER:
            self.output_scales |= output_scales(space.architecture, space.dimensions, layer, self._start, transforms)
        alone = _of_layer(transforms, layer)
        folded = fold(space.architecture, space.dimensions, space.weights, alone)
        prefix = f"{space.architecture.layers}.{layer}."
        changed = {name: folded[name] for name in folded if name.startswith(prefix)}
        weights: Mapping[str, Tensor] = self._held
        if isinstance(space.weights, LazyWeights):
            weights = fold(space.architecture, space.dimensions, space.weights, transforms)
        else:
            self._held.update(changed)
        replace_weights(space.model, space.architecture, changed)
        online = online_by_path(space.architecture, transforms)
        space.quantization.online.update({path: each for path, each in online.items() if path.startswith(prefix)})
        self.candidate = replace(
            self.candidate,
            transforms=transforms,
            weights=weights,
            online={**self.candidate.online, **online},
        )


class _Current(LazyWeights):
    """The lazy weights of a candidate that changes: blocks that were learned are folded anew when they are read."""

    def __init__(self, blocks: LearnedBlocks, weights: LazyWeights) -> None:
        self._blocks, self._untransformed = blocks, weights

    @property
    def scratch(self) -> Scratch:
        return self._untransformed.scratch

    @property
    def names(self) -> Collection[str]:
        return self._blocks.candidate.weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._untransformed.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._blocks.candidate.weights[name]


def _of_layer(transforms: Transforms, layer: int) -> Transforms:
    """The parts of one layer, and no other."""

    def own(parts: Mapping[tuple[int, str], Part]) -> dict[tuple[int, str], Part]:
        return {key: value for key, value in parts.items() if key[0] == layer}

    heads = transforms.head_rotations
    return Transforms(
        diagonals=own(transforms.diagonals),
        diagonals_before=own(transforms.diagonals_before),
        head_rotations={layer: heads[layer]} if layer in heads else {},
        online=own(transforms.online),
    )
