"""Clips and grids of a block as its learning left them, for the steps that would search them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from bdq_export.calibration.sites import block_sites
from bdq_export.learning.block_student import BlockStudent
from bdq_export.quantize.grid import Grid
from bdq_runtime.specs import ActivationQuantization, KVQuantization


@dataclass
class LearnedClips:
    """Of one block at a time; empty where nothing was learned.

    Attributes:
        activations: canonical path of a linear -> quantization of its inputs.
        kv: layer -> quantization of its cache.
        grids: canonical weight name -> grid of that weight.
    """

    activations: dict[str, ActivationQuantization] = field(default_factory=dict)
    kv: dict[int, KVQuantization] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)

    def forget(self) -> None:
        """Be empty."""
        for found in (self.activations, self.kv, self.grids):
            found.clear()

    def keep(self, student: BlockStudent, weights: Mapping[str, Tensor]) -> None:
        """Take what `student` learned of its block.

        Args:
            student: with the parameters that are kept.
            weights: canonical weights, folded with its transforms.
        """
        architecture, parameters, layer = student.architecture, student.parameters, student.layer
        for site in block_sites(architecture, student.dimensions, layer):
            if student.activation is not None:
                clip = float(parameters.clip(site.paths[0]).detach())
                self.activations.update(dict.fromkeys(site.paths, replace(student.activation, clip=clip)))
        if student.cache is not None:
            keys, values = (float(clip) for clip in parameters.cache_clips().detach())
            self.kv[layer] = replace(student.cache, key_clip=keys, value_clip=values)
        for path in architecture.linears:
            name = f"{architecture.layer_path(layer, path)}.weight"
            grid = student.grid(path, weights[name])
            if grid is not None:
                self.grids[name] = grid
