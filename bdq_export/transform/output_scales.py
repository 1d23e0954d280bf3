"""By what the outputs of linears grow when diagonals are replaced by others."""

from __future__ import annotations

import torch
from torch import Tensor

from bdq_export.transform.channels import expand
from bdq_export.transform.transforms import Transforms
from bdq_models import Architecture, Dimensions, Side


def output_scales(
    architecture: Architecture, dimensions: Dimensions, layer: int, old: Transforms, new: Transforms
) -> dict[str, Tensor]:
    """Canonical path of each linear of `layer` -> factors of its outputs `[N]` float64, where there are any.

    Args:
        architecture: its family.
        dimensions: its sizes.
        layer: index of the block.
        old: transforms that the block was folded with.
        new: others, that differ in diagonals only; where a folded rotation lies between both diagonals of an edge, in
            the one behind it.
    """
    found: dict[str, Tensor] = {}
    for edge in architecture.edges:
        key, ones = (layer, edge.name), torch.ones(dimensions.free_channels(edge), dtype=torch.float64)
        scale = ones
        for before, after in ((old.diagonals, new.diagonals), (old.diagonals_before, new.diagonals_before)):
            scale = scale * (after.get(key, ones).to(torch.float64) / before.get(key, ones).to(torch.float64))
        if bool((scale == 1).all()):
            continue
        scaled = dict.fromkeys(edge.producers, scale)
        if edge.consumer_side is Side.OUTPUT:
            scaled |= dict.fromkeys(edge.consumers, 1 / expand(edge, dimensions, scale))
        for path, factors in scaled.items():
            if not architecture.is_norm(path):
                whole = architecture.layer_path(layer, path)
                found[whole] = found[whole] * factors if whole in found else factors
    return found
