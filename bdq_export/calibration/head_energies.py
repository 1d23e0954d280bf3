"""How large the channels of query and key heads are after RoPE and head norms: what a cache holds and is read by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.fake_quant.attention import attention_inputs
from bdq_export.transform import input_diagonal
from bdq_export.transform.channels import tie_mean
from bdq_export.transform.transforms import Diagonals
from bdq_models import Architecture, Dimensions


@dataclass(frozen=True, eq=False)
class HeadEnergies:
    """E[x²] of each channel of one layer, float64.

    Attributes:
        query: `[heads, head_dim]`.
        key: `[kv_heads, head_dim]`.
    """

    query: Tensor
    key: Tensor


def head_energies(runner: BlockRunner) -> dict[int, HeadEnergies]:
    """Layer -> energies over the runner's tokens."""
    sums: dict[int, list[Tensor]] = {}
    counts: dict[int, int] = {}

    def observe(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = [states.double().square().sum((0, 2)) for states in (query, key)]
        sums[layer] = [a + b for a, b in zip(sums[layer], found, strict=True)] if layer in sums else found
        counts[layer] = counts.get(layer, 0) + query.shape[0] * query.shape[2]
        return query, key, value

    with torch.inference_mode(), attention_inputs(runner.model, runner.layers, observe):
        hidden = runner.embedded()
        for layer in range(len(runner.blocks)):
            hidden = runner.run(layer, hidden)
    for layer in sums:
        parallel.add_up(*sums[layer])
        counts[layer] = round(parallel.total(counts[layer])[0])
    return {layer: HeadEnergies(*(each / counts[layer] for each in sums[layer])) for layer in sums}


def key_query_diagonals(
    architecture: Architecture, dimensions: Dimensions, energies: Mapping[int, HeadEnergies]
) -> Diagonals:
    """λ = (E q² / E k²)^¼ of each RoPE pair.

    The least `E|qΛ⁻¹|² · E|kΛ|²`, and so the least noise in the scores from rounding keys.
    """
    edge = architecture.edge("key_query")
    diagonals = {}
    for layer, found in energies.items():
        query = found.query.reshape(dimensions.kv_heads, dimensions.group, dimensions.head_dim).sum(1)
        key = found.key
        if dimensions.free_channels(edge) == dimensions.head_dim:  # gains of head norms: shared by all heads
            query, key = query.sum(0), key.sum(0)
        pairs = [tie_mean(edge, dimensions, each.reshape(-1)) for each in (query, key)]
        diagonals[layer, edge.name] = input_diagonal(pairs[0], pairs[1])
    return diagonals
