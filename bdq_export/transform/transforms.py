"""The transforms of a model, and whether they fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdq_export.transform.channels import is_tied
from bdq_models import Architecture, Dimensions, Edge

ORTHOGONALITY = 1e-8
"""Largest entry of |RᵀR - I|: a float64 rotation passes, one rounded to float32 does not."""

Diagonals = Mapping[tuple[int, str], Tensor]


@dataclass(frozen=True, eq=False)
class Transforms:
    """`T = Λa · R · Λb` of every edge; absent parts are identities.

    Attributes:
        diagonals: Λb, keyed by (layer, edge name): positive factors of the edge's free channels, i.e. of the
            producers' outputs. On `attention_in` and `mlp_in` they end up in the norm weight.
        diagonals_before: Λa, folded before the rotations. Under a residual rotation the factors of the edges
            that start at a norm are absorbed together with the norm's gain and have no effect.
        residual_rotation: R1, float64 `[hidden, hidden]` orthogonal, of the residual stream: `h' = h R1`.
        head_rotations: R2 by layer, float64 orthogonal `[head_dim, head_dim]` for all KV heads or
            `[kv_heads, head_dim, head_dim]`: `v' = v R2` in each head.
    """

    diagonals: Diagonals = field(default_factory=dict)
    diagonals_before: Diagonals = field(default_factory=dict)
    residual_rotation: Tensor | None = None
    head_rotations: Mapping[int, Tensor] = field(default_factory=dict)

    def touches(self, layer: int) -> bool:
        """Whether any weight of decoder layer `layer` changes."""
        keys = (*self.diagonals, *self.diagonals_before)
        return (
            self.residual_rotation is not None
            or layer in self.head_rotations
            or any(index == layer for index, _ in keys)
        )


def check_transforms(architecture: Architecture, dimensions: Dimensions, transforms: Transforms) -> None:
    """Make sure that folding `transforms` cannot change the function of the model.

    Raises:
        ValueError: an edge or a layer that the model does not have, a diagonal of a wrong length, not positive,
            not finite or different within a RoPE pair, a rotation that is not orthogonal, or a residual rotation
            of a family whose norms do not commute with it.
    """
    for diagonals in (transforms.diagonals_before, transforms.diagonals):
        for (layer, name), scale in diagonals.items():
            _check_layer(dimensions, layer, name)
            _check_diagonal(_edge(architecture, name), dimensions, layer, scale)
    rotation = transforms.residual_rotation
    if rotation is not None:
        if not architecture.residual_rotation:
            raise ValueError(f"{architecture.name}: its norms do not commute with a residual rotation; leave it out")
        _check_rotation("the residual rotation", rotation, dimensions.hidden_size)
    for layer, rotation in transforms.head_rotations.items():
        _check_layer(dimensions, layer, "head rotation")
        if rotation.dim() == 3 and rotation.shape[0] != dimensions.kv_heads:
            raise ValueError(
                f"layer {layer}: {rotation.shape[0]} head rotations, expected {dimensions.kv_heads} (KV heads)"
            )
        for matrix in rotation if rotation.dim() == 3 else (rotation,):
            _check_rotation(f"layer {layer}: a head rotation", matrix, dimensions.head_dim)


def _edge(architecture: Architecture, name: str) -> Edge:
    try:
        return architecture.edge(name)
    except LookupError as error:
        raise ValueError(str(error)) from error


def _check_layer(dimensions: Dimensions, layer: int, what: str) -> None:
    if not 0 <= layer < dimensions.layers:
        raise ValueError(f"{what}: layer {layer} does not exist, the model has {dimensions.layers} layers")


def _check_diagonal(edge: Edge, dimensions: Dimensions, layer: int, scale: Tensor) -> None:
    where = f"layer {layer}, edge {edge.name}"
    length = dimensions.free_channels(edge)
    if tuple(scale.shape) != (length,):
        raise ValueError(f"{where}: the diagonal has shape {tuple(scale.shape)}, expected ({length},)")
    if not bool(torch.isfinite(scale).all()) or scale.amin().item() <= 0:
        raise ValueError(f"{where}: the diagonal has entries that are not positive and finite")
    if not is_tied(edge, dimensions, scale):
        raise ValueError(f"{where}: the diagonal differs within a RoPE pair; tie it with transform.channels.tie")


def _check_rotation(what: str, matrix: Tensor, size: int) -> None:
    if tuple(matrix.shape) != (size, size):
        raise ValueError(f"{what} has shape {tuple(matrix.shape)}, expected ({size}, {size})")
    exact = matrix.to(torch.float64)
    error = (exact.T @ exact - torch.eye(size, dtype=torch.float64)).abs().amax().item()
    if not error <= ORTHOGONALITY:
        raise ValueError(f"{what} is not orthogonal: |RᵀR - I| is {error:.1e}, expected {ORTHOGONALITY:.0e} or less")
