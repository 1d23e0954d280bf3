"""Where FlatQuant (arXiv 2410.09426) starts: random orthogonal Kronecker products behind closed-form diagonals.

| inputs of | diagonal in front  | transform                                                                       |
| --------- | ------------------ | ------------------------------------------------------------------------------- |
| q, k, v   | in the norm's gain | P1 ⊗ P2 online                                                                  |
| o         | none               | P_o ⊗ P_v: P_v `[head_dim, head_dim]`, one for all heads, is folded in v, so    |
|           |                    | that the cache sees it; P_o `[heads, heads]` runs online                        |
| gate, up  | in the norm's gain | P1 ⊗ P2 online                                                                  |
| down      | in the rows of up  | P1 ⊗ P2 online                                                                  |

Keys keep this project's diagonal and Hadamard transform where the paper learns one more matrix for each head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdq_export.calibration.candidates import Statistics, closed_form_diagonals
from bdq_export.transform import Transforms
from bdq_export.transform.channels import consumer_channels
from bdq_export.transform.kronecker import factor_sizes, random_kronecker, random_orthogonal
from bdq_models import Architecture, Dimensions, Side

VALUE = "value"
_SEED = 104729
"""Apart from the seeds of other rotations, which count up from the export's."""


def kronecker_start(
    architecture: Architecture, dimensions: Dimensions, weights: Mapping[str, Tensor], statistics: Statistics, seed: int
) -> Transforms:
    """The transforms of every layer before anything is learned.

    Args:
        architecture: the family.
        dimensions: sizes of the model.
        weights: canonical float weights.
        statistics: of the inputs of all linears.
        seed: of the random matrices.
    """
    generator = torch.Generator().manual_seed(seed + _SEED)
    closed = closed_form_diagonals(architecture, dimensions, weights, statistics)
    edges = [edge for edge in architecture.edges if edge.consumer_side is Side.INPUT]
    heads, online = {}, {}
    for layer in range(dimensions.layers):
        heads[layer] = random_orthogonal(dimensions.head_dim, generator)
        for edge in edges:
            if edge.name == VALUE:
                left, right = consumer_channels(edge, dimensions) // dimensions.head_dim, None
            else:
                left, right = factor_sizes(consumer_channels(edge, dimensions))
            online[layer, edge.name] = random_kronecker(left, right, generator)
    before = {key: diagonal for key, diagonal in closed.items() if key[1] != VALUE}
    return Transforms(diagonals_before=before, head_rotations=heads, online=online)
