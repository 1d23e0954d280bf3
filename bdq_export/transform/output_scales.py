"""What transforms do to the outputs of linears, where they only scale them."""

from __future__ import annotations

import torch
from torch import Tensor

from bdq_export.transform.channels import expand
from bdq_export.transform.transforms import Transforms
from bdq_models import Architecture, Dimensions, Side


def output_scales(
    architecture: Architecture, dimensions: Dimensions, transforms: Transforms
) -> dict[str, Tensor] | None:
    """Canonical path of a linear -> factors `[N]` float64 of its outputs in the folded model; absent ones are 1.

    None where outputs are mixed: by a residual rotation or by one of value heads.
    """
    if transforms.residual_rotation is not None or transforms.head_rotations:
        return None
    scales: dict[str, Tensor] = {}
    for diagonals in (transforms.diagonals_before, transforms.diagonals):
        for (layer, name), diagonal in diagonals.items():
            edge, scale = architecture.edge(name), diagonal.to(torch.float64)
            changes = dict.fromkeys(edge.producers, scale)
            if edge.consumer_side is Side.OUTPUT:
                changes |= dict.fromkeys(edge.consumers, 1 / expand(edge, dimensions, scale))
            for path, change in changes.items():
                if architecture.is_norm(path):
                    continue
                full = architecture.layer_path(layer, path)
                scales[full] = scales[full] * change if full in scales else change
    return scales
