"""The transforms of a scheme whose activations or cache are quantized: `T = Λa · R · Λb` at every site, in closed form.

    none           nothing
    smooth         SmoothQuant's Λb on the edges that start at a norm
    hadamard       random R1 .. R4 and no diagonals (what QuaRot does)
    spin           the same, where R1 and R2 start from (`learned_rotations` is what SpinQuant does)
    bdq            Λb on every edge and between keys and queries, no R
    bdq-rotated    Λa · R · Λb: λ = (Σw² / E x²)^¼ on both sides of every rotation, and between keys and queries
    bdq-online     the same without R1: the inputs of q, k, v, gate and up are rotated online

To tell what each part is worth, some that nothing else tries:

    bdq-plain      bdq, and heads of the cache are not rotated either
    diag           bdq-online without Λa in front of its rotations (signs are left)
    diag-before    bdq-online without Λb behind them, nor Λb of v → o
    diag-none      bdq-online without all of these

and a rival:

    kronecker      FlatQuant: P = P1 ⊗ P2 online at every site and Λa in front of it where a norm or up_proj makes it;
                   random orthogonal here, learned block by block later (see `calibration.kronecker`)

The last three of BDQ's keep the factors of keys and queries, and aligned heads.

R2 is folded, and aligned (see `head_alignment`) where there are diagonals; R4, in front of down_proj, runs online, and
so does what mixes heads in front of o_proj.
R1 costs nothing when the model runs, but leaves no place for a Λa at the inputs that norms make: after it, channels are
equally energetic on both sides, and no diagonal can move the energy of activations to where the weights are small. On
SmolLM2-135M, rounding the inputs of gate and up adds four times as much noise to their outputs with R1 as with Λa and
an online rotation, which is worth one bit. Norms that do not commute with R1 leave no choice.

Where channels of the cache have static scales, factors of keys and queries would change those scales and nothing else,
and there is no R3: both are left out.

R3 rotates query and key heads inside of attention and is no part of the weights (`KVQuantization.hadamard`). Hadamard
matrices have no signs of their own: they are folded into Λa.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bdq_export.calibration.candidates import (
    BARE,
    ROTATED,
    Statistics,
    closed_form_diagonals,
    rotations,
    smooth_diagonals,
)
from bdq_export.calibration.head_alignment import aligned_heads
from bdq_export.calibration.head_energies import head_energies, key_query_diagonals
from bdq_export.calibration.kronecker import kronecker_start
from bdq_export.calibration.workspace import Workspace
from bdq_export.fake_quant import largest_size
from bdq_export.options import KRONECKER, PARTIAL
from bdq_export.transform import Transforms, fold, online_by_path
from bdq_export.transform.channels import consumer_channels
from bdq_export.transform.transforms import Diagonals
from bdq_models import Architecture, Dimensions, Edge, Side
from bdq_runtime.specs import OnlineTransform

ONLINE = "bdq-online"
PLAIN = "bdq-plain"
_WITHOUT_BEFORE = ("diag", "diag-none")
_WITHOUT_AFTER = ("diag-before", "diag-none")
_SIGN_SEED = 7919
"""Apart from the seeds of the rotations, which count up from the export's."""


def sandwich(space: Workspace, name: str, statistics: Statistics, seed: int) -> Transforms:
    """The transforms of candidate `name`; the model computes with the untransformed weights before and after.

    Args:
        space: the model.
        name: of the candidate.
        statistics: of the untransformed model.
        seed: of rotations and signs.
    """
    architecture, dimensions = space.architecture, space.dimensions
    if name == "smooth":
        return Transforms(smooth_diagonals(architecture, dimensions, space.weights, statistics))
    if name not in ("bdq", ONLINE, PLAIN, KRONECKER, *ROTATED, *PARTIAL):
        return Transforms()
    keys: Diagonals = {}
    if name not in BARE and not space.has_static_cache:
        keys = key_query_diagonals(architecture, dimensions, head_energies(space.few_runner()))
    if name in ("bdq", PLAIN):
        return Transforms({**keys, **closed_form_diagonals(architecture, dimensions, space.weights, statistics)})
    if name == KRONECKER:
        return replace(kronecker_start(architecture, dimensions, space.weights, statistics, seed), diagonals=keys)
    residual = architecture.residual_rotation and name in ROTATED
    rotated = _rotated(architecture, dimensions, seed, residual, space.rotates_online)
    if not space.rotates_online:
        return replace(rotated, diagonals=keys)
    if name in BARE:
        return with_mixed_heads(architecture, dimensions, replace(rotated, diagonals=keys), seed)
    before = rotated.diagonals_before
    if name not in _WITHOUT_BEFORE:
        closed = closed_form_diagonals(architecture, dimensions, space.weights, statistics)
        before = {key: signs * closed[key] for key, signs in before.items()}
    heads = aligned_heads(architecture, dimensions, space.weights, space.few_runner(), seed)
    first = replace(rotated, diagonals=keys, diagonals_before=before, head_rotations=heads)
    found = first if name in _WITHOUT_AFTER else _with_second_diagonals(space, first)
    return with_mixed_heads(architecture, dimensions, found, seed)


def _rotated(
    architecture: Architecture, dimensions: Dimensions, seed: int, residual: bool, online_allowed: bool
) -> Transforms:
    """Random R1 (where `residual` says so), R2 and, if allowed, online rotations with their signs."""
    generator = torch.Generator().manual_seed(seed + _SIGN_SEED)
    before: dict[tuple[int, str], Tensor] = {}
    online: dict[tuple[int, str], OnlineTransform] = {}
    edges = online_edges(architecture, residual) if online_allowed else ()
    for layer in range(dimensions.layers):
        for edge in edges:
            channels = dimensions.free_channels(edge)
            before[layer, edge.name] = torch.randint(0, 2, (channels,), generator=generator).double() * 2 - 1
            online[layer, edge.name] = OnlineTransform(largest_size(consumer_channels(edge, dimensions)))
    folded = rotations(architecture, dimensions, seed)
    rotation = folded.residual_rotation if residual else None
    return replace(folded, residual_rotation=rotation, diagonals_before=before, online=online)


def online_edges(architecture: Architecture, residual: bool) -> tuple[Edge, ...]:
    """Where no rotation is folded: inputs that are products, and without a `residual` rotation those of norms."""
    folded = {path for _, readers in architecture.residual_readers for path in readers}
    heads = {path for path in architecture.edge("value").consumers}
    return tuple(
        edge
        for edge in architecture.edges
        if edge.consumer_side is Side.INPUT
        and edge.consumers[0] not in heads
        and not (residual and edge.consumers[0] in folded)
    )


def with_mixed_heads(
    architecture: Architecture, dimensions: Dimensions, transforms: Transforms, seed: int
) -> Transforms:
    """`transforms` and an online Hadamard transform across heads in front of o_proj (QuaRot's).

    A token's heads differ in size, which no folded matrix can mend (measured: docs/design.md, "Heads are mixed"). Where
    no block of a power of two spans all heads, blocks take channels of all of them in turns. Its diagonal is 1, for the
    learned stages.
    """
    edge = architecture.edge("value")
    channels = consumer_channels(edge, dimensions)
    size = largest_size(channels)
    runs = 1 if size == channels else dimensions.heads
    if dimensions.heads == 1 or size == 1:
        return transforms
    mixed = OnlineTransform(size, np.ones(channels, np.float32), interleave=runs)
    online = {(layer, edge.name): mixed for layer in range(dimensions.layers)}
    heads = transforms.head_rotations if runs > 1 else _signed(transforms.head_rotations, seed)
    return replace(transforms, head_rotations=heads, online={**transforms.online, **online})


def _signed(rotations: Mapping[int, Tensor], seed: int) -> dict[int, Tensor]:
    """Random signs behind the transforms of value heads, which end with a Hadamard transform.

    One of all heads in their own order is a product of one across heads and one in each head: straight behind the same
    one in the head it would undo that, and leave its channels as uneven as they were.
    """
    found = {}
    for layer, rotation in rotations.items():
        generator = torch.Generator().manual_seed(seed + 1 + layer + len(rotations))
        signs = torch.randint(0, 2, (*rotation.shape[:-2], 1, rotation.shape[-1]), generator=generator)
        found[layer] = rotation * (signs.to(rotation.dtype) * 2 - 1)
    return found


def _with_second_diagonals(space: Workspace, first: Transforms) -> Transforms:
    """Add the Λb that the closed form gives for the rotated model."""
    weights = fold(space.architecture, space.dimensions, space.weights, first)
    space.install(weights, online_by_path(space.architecture, first))
    closed = closed_form_diagonals(space.architecture, space.dimensions, weights, space.statistics())
    space.install(space.weights)
    online = {key: replace(transform, diagonal=closed[key].float().numpy()) for key, transform in first.online.items()}
    after: Mapping[tuple[int, str], Tensor] = {
        key: diagonal for key, diagonal in closed.items() if key not in first.online
    }
    return replace(first, diagonals={**first.diagonals, **after}, online=online)
