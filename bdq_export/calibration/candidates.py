"""The transforms that an export can try, from the statistics of the float model.

All are parts of one framework, `T = Λa · R · Λb` on every edge:

    none           nothing
    smooth         SmoothQuant's Λb (α = 0.5) on the edges that start at a norm
    hadamard       R1 (residual stream) and R2 (value heads), seeded
    spin           the same, learned (`learned_rotations`)
    bdq            the closed-form Λb on every edge, no R: tied embeddings stay tied
    bdq-rotated    R1 and R2, then the closed-form Λb of the rotated model
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdq_export.calibration.statistics import InputStatistics
from bdq_export.options import SPIN
from bdq_export.transform import Transforms, input_diagonal, random_hadamard, smooth_diagonal
from bdq_export.transform.channels import expand, reduce, tie
from bdq_export.transform.transforms import Diagonals
from bdq_models import Architecture, Dimensions, Edge, Side

Statistics = Mapping[str, InputStatistics]
"""Canonical path of a linear -> statistics of its inputs."""
Energies = Mapping[str, Tensor]
"""Canonical path of a linear -> E[x²] of its inputs, float64 `[K]`."""

BARE = ("hadamard", SPIN)
"""Rotations without diagonals."""
ROTATED = (*BARE, "bdq-rotated")


def rotations(architecture: Architecture, dimensions: Dimensions, seed: int) -> Transforms:
    """R2 for each layer and, where the family's norms commute with it, R1 of the residual stream; all from `seed`."""
    heads = {layer: random_hadamard(dimensions.head_dim, seed + 1 + layer) for layer in range(dimensions.layers)}
    residual = random_hadamard(dimensions.hidden_size, seed) if architecture.residual_rotation else None
    return Transforms(residual_rotation=residual, head_rotations=heads)


def closed_form_diagonals(
    architecture: Architecture, dimensions: Dimensions, weights: Mapping[str, Tensor], statistics: Statistics
) -> dict[tuple[int, str], Tensor]:
    """λ = (Σw² / E x²)^¼ of every edge whose consumers read the scaled channels.

    An edge between two outputs (keys and queries) is left out: its factors go into scales of output rows, which no
    quantizer of this version shares.
    """
    diagonals = {}
    for edge, layer, paths in _reading_edges(architecture, dimensions):
        energy = torch.stack([weights[f"{path}.weight"].double().square().sum(0) for path in paths]).sum(0)
        seen = statistics[paths[0]].energy
        diagonal = input_diagonal(reduce(edge, dimensions, energy), reduce(edge, dimensions, seen))
        diagonals[layer, edge.name] = tie(edge, dimensions, diagonal)
    return diagonals


def smooth_diagonals(
    architecture: Architecture, dimensions: Dimensions, weights: Mapping[str, Tensor], statistics: Statistics
) -> dict[tuple[int, str], Tensor]:
    """SmoothQuant's factors on the edges that start at a norm."""
    norms = {norm for norm, _ in architecture.residual_readers}
    diagonals = {}
    for edge, layer, paths in _reading_edges(architecture, dimensions):
        if all(producer in norms for producer in edge.producers):
            largest = torch.stack([weights[f"{path}.weight"].abs().amax(0) for path in paths]).amax(0)
            diagonals[layer, edge.name] = smooth_diagonal(largest, statistics[paths[0]].absmax)
    return diagonals


def scaled_energies(
    architecture: Architecture, dimensions: Dimensions, statistics: Statistics, diagonals: Diagonals
) -> dict[str, Tensor]:
    """E[x²] of every linear's inputs once `diagonals` are folded."""
    energies = {path: seen.energy for path, seen in statistics.items()}
    for edge, layer, paths in _reading_edges(architecture, dimensions):
        if (layer, edge.name) in diagonals:
            factors = expand(edge, dimensions, diagonals[layer, edge.name]).square()
            energies.update({path: energies[path] * factors for path in paths})
    return energies


def _reading_edges(architecture: Architecture, dimensions: Dimensions) -> list[tuple[Edge, int, list[str]]]:
    """Every edge that scales inputs of its consumers, by layer, with the consumers' canonical paths."""
    return [
        (edge, layer, [architecture.layer_path(layer, consumer) for consumer in edge.consumers])
        for layer in range(dimensions.layers)  # outside: lazy weights keep one layer
        for edge in architecture.edges
        if edge.consumer_side is Side.INPUT
    ]
