"""The transforms of a model, and whether they fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bdq_export.transform.channels import consumer_channels, is_tied
from bdq_export.transform.kronecker import condition, factors_of
from bdq_models import Architecture, Dimensions, Edge, Side
from bdq_runtime.opset import MAX_HADAMARD
from bdq_runtime.specs import Kronecker, OnlineTransform

ORTHOGONALITY = 1e-8
"""Largest entry of |RᵀR - I|: a float64 rotation passes, one rounded to float32 does not."""

CONDITION = 1e4
"""Largest condition number of what is no rotation: folding it loses no more digits than float32 can spare."""

Diagonals = Mapping[tuple[int, str], Tensor]


@dataclass(frozen=True, eq=False)
class Transforms:
    """`T = Λa · R · Λb` of every edge; absent parts are identities.

    Attributes:
        diagonals: Λb, keyed by (layer, edge name): factors of the edge's free channels, i.e. of the producers'
            outputs; not 0, but of either sign. On `attention_in` and `mlp_in` they end up in the norm weight.
        diagonals_before: Λa, folded before the rotations. Under a residual rotation the factors of the edges
            that start at a norm are absorbed together with the norm's gain and have no effect.
        residual_rotation: R1, float64 `[hidden, hidden]` orthogonal, of the residual stream: `h' = h R1`.
        head_rotations: R2 by layer, float64 `[head_dim, head_dim]` for all KV heads or
            `[kv_heads, head_dim, head_dim]`: `v' = v R2` in each head. Both sides are folded, so any well-conditioned
            matrix will do, not rotations only.
        online: R and Λb that the consumers of (layer, edge name) apply to their inputs themselves, after all
            that is folded: `x' = Hadamard(x) * diagonal`, `W' = W H diag⁻¹`. R4 is the one of `mlp_middle`. Or an
            invertible `P = left ⊗ right`: `x' = x P`, `W' = W P⁻ᵀ`. At `value` it mixes heads, which `head_rotations`
            leave apart.
    """

    diagonals: Diagonals = field(default_factory=dict)
    diagonals_before: Diagonals = field(default_factory=dict)
    residual_rotation: Tensor | None = None
    head_rotations: Mapping[int, Tensor] = field(default_factory=dict)
    online: Mapping[tuple[int, str], OnlineTransform] = field(default_factory=dict)

    def touches(self, layer: int) -> bool:
        """Whether any weight of decoder layer `layer` changes."""
        keys = (*self.diagonals, *self.diagonals_before, *self.online)
        return (
            self.residual_rotation is not None
            or layer in self.head_rotations
            or any(index == layer for index, _ in keys)
        )


def check_transforms(architecture: Architecture, dimensions: Dimensions, transforms: Transforms) -> None:
    """Make sure that folding `transforms` cannot change the function of the model.

    Raises:
        ValueError: an edge or a layer that the model does not have, a diagonal of a wrong length, with zeros,
            not finite or different within a RoPE pair, a rotation that is not orthogonal, a residual rotation
            of a family whose norms do not commute with it, or an online Hadamard whose size does not fit.
    """
    for diagonals in (transforms.diagonals_before, transforms.diagonals):
        for (layer, name), scale in diagonals.items():
            _check_layer(dimensions, layer, name)
            _check_diagonal(_edge(architecture, name), dimensions, layer, scale)
    for (layer, name), online in transforms.online.items():
        _check_layer(dimensions, layer, name)
        _check_online(_edge(architecture, name), dimensions, layer, online)
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
            _check_invertible(f"layer {layer}: a head rotation", matrix, dimensions.head_dim)


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
    if not _is_usable(scale):
        raise ValueError(f"{where}: the diagonal has entries that are 0 or not finite")
    if not is_tied(edge, dimensions, scale):
        raise ValueError(f"{where}: the diagonal differs within a RoPE pair; tie it with transform.channels.tie")


def _check_online(edge: Edge, dimensions: Dimensions, layer: int, online: OnlineTransform) -> None:
    where = f"layer {layer}, edge {edge.name}"
    channels, size = consumer_channels(edge, dimensions), online.hadamard_size
    if edge.consumer_side is not Side.INPUT:
        raise ValueError(f"{where}: its consumers are no inputs of a linear, so there is no online transform")
    if online.kronecker is not None:
        _check_kronecker(where, channels, online, online.kronecker)
    if not 1 <= size <= MAX_HADAMARD or size & (size - 1) or channels % size:
        raise ValueError(
            f"{where}: the Hadamard size is {size}, expected a power of two to {MAX_HADAMARD} that divides {channels}"
        )
    if online.interleave < 1 or channels % online.interleave:
        raise ValueError(f"{where}: {online.interleave} runs of channels take turns, expected a divisor of {channels}")
    if online.diagonal is not None:
        if online.diagonal.shape != (channels,):
            raise ValueError(f"{where}: the online diagonal has shape {online.diagonal.shape}, expected ({channels},)")
        if not _is_usable(torch.from_numpy(online.diagonal)):
            raise ValueError(f"{where}: the online diagonal has entries that are 0 or not finite")


def _check_kronecker(where: str, channels: int, online: OnlineTransform, kronecker: Kronecker) -> None:
    if online.hadamard_size != 1 or online.diagonal is not None:
        raise ValueError(f"{where}: a Kronecker product beside a Hadamard transform or a diagonal, expected it alone")
    sizes = [1 if each is None else len(each) for each in (kronecker.left, kronecker.right)]
    shapes = [None if each is None else each.shape for each in (kronecker.left, kronecker.right)]
    square = all(shape is None or shape == (size, size) for shape, size in zip(shapes, sizes, strict=True))
    whole = sizes[0] * sizes[1]
    if not square or whole < 1 or channels % whole or (kronecker.right is not None and whole != channels):
        raise ValueError(f"{where}: Kronecker factors {shapes}, expected square ones whose product has {channels} rows")
    found = condition(factors_of(kronecker, torch.float64))
    if not found <= CONDITION:
        raise ValueError(
            f"{where}: the Kronecker product has condition number {found:.1e}, expected {CONDITION:.0e} or less"
        )


def _is_usable(scale: Tensor) -> bool:
    """All factors are finite and have a finite inverse."""
    return bool((torch.isfinite(scale) & torch.isfinite(1 / scale)).all())


def _check_invertible(what: str, matrix: Tensor, size: int) -> None:
    _check_shape(what, matrix, size)
    condition = float(torch.linalg.cond(matrix.to(torch.float64)))
    if not condition <= CONDITION:
        raise ValueError(f"{what} has condition number {condition:.1e}, expected {CONDITION:.0e} or less")


def _check_shape(what: str, matrix: Tensor, size: int) -> None:
    if tuple(matrix.shape) != (size, size):
        raise ValueError(f"{what} has shape {tuple(matrix.shape)}, expected ({size}, {size})")


def _check_rotation(what: str, matrix: Tensor, size: int) -> None:
    _check_shape(what, matrix, size)
    exact = matrix.to(torch.float64)
    error = (exact.T @ exact - torch.eye(size, dtype=torch.float64)).abs().amax().item()
    if not error <= ORTHOGONALITY:
        raise ValueError(f"{what} is not orthogonal: |RᵀR - I| is {error:.1e}, expected {ORTHOGONALITY:.0e} or less")
