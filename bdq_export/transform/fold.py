"""Fold transforms into the weights: new weights, the same function.

    diagonal of an edge     producer rows, bias or gain × D       consumer columns (or rows and bias) × D⁻¹
    residual rotation R1    E' = E R1    reader W' = W diag(γ) R1    writer W' = R1ᵀ W, b' = b R1    γ' = 1
    head transform R2       v: W' = R2ᵀ W, b' = b R2 in each KV head      o: W' = W R2⁻ᵀ in each query head
    online H, Λ             consumer W' = W H Λ⁻¹; the consumer computes (x H) Λ when it runs; columns interleaved first
    online P = P1 ⊗ P2      consumer W' = W P⁻ᵀ; the consumer computes x P when it runs

`W [N, K]` multiplies from the right, `y = x Wᵀ + b`. The order is diagonals before, rotations, diagonals after, online;
all of it is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from bdq_export.lazy_weights import LazyWeights, layer_of
from bdq_export.process_memory import return_freed_memory
from bdq_export.scratch import Scratch
from bdq_export.transform.channels import expand
from bdq_export.transform.hadamard import hadamard, interleaved
from bdq_export.transform.kronecker import unapply_kronecker
from bdq_export.transform.transforms import Diagonals, Transforms, check_transforms
from bdq_models import Architecture, Dimensions, Edge, Side
from bdq_runtime.specs import OnlineTransform

ROWS = 16384
"""Rows of a vocabulary-sized matrix that are in float64 at a time."""


def fold(
    architecture: Architecture,
    dimensions: Dimensions,
    weights: Mapping[str, Tensor],
    transforms: Transforms,
) -> Mapping[str, Tensor]:
    """The weights of the transformed model; `weights` is left as it is.

    Args:
        weights: canonical weights; without `lm_head.weight` when tied.

    Returns:
        All weights in their input dtype; unchanged ones are the same tensors. With a residual rotation there is
        a `lm_head.weight`: the gain of the final norm goes into it, so it can no longer be the embedding. Where there
        are online transforms, the weights are the model's only together with them (`online_by_path`). Of
        `LazyWeights`, a layer is folded when one of its weights is read, and only the last such layer is kept.

    Raises:
        ValueError: the transforms do not fit the model (see `check_transforms`), or a weight is missing.
    """
    check_transforms(architecture, dimensions, transforms)
    if isinstance(weights, LazyWeights):
        return _FoldedWeights(architecture, dimensions, weights, transforms)
    folded = dict(weights)
    if transforms.residual_rotation is not None:
        folded.update(_rotate_ends(architecture, weights, transforms.residual_rotation))
    for index in range(dimensions.layers):
        if transforms.touches(index):
            folded.update(_folded_layer(architecture, dimensions, weights, transforms, index))
    return folded


class _FoldedWeights(LazyWeights):
    """What `fold` gives for lazy weights: no transform mixes weights of two layers, so each is folded by itself."""

    def __init__(
        self, architecture: Architecture, dimensions: Dimensions, weights: LazyWeights, transforms: Transforms
    ) -> None:
        self._architecture, self._dimensions = architecture, dimensions
        self._weights, self._transforms = weights, transforms
        self._ends: dict[str, Tensor] = {}
        if transforms.residual_rotation is not None:
            self._ends = _rotate_ends(architecture, weights, transforms.residual_rotation)
        self._names = {**dict.fromkeys(weights), **dict.fromkeys(self._ends)}
        self._folded: tuple[int, dict[str, Tensor]] = (-1, {})

    @property
    def scratch(self) -> Scratch:
        return self._weights.scratch

    @property
    def names(self) -> Collection[str]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._ends[name].shape) if name in self._ends else self._weights.shape(name)

    def __getitem__(self, name: str) -> Tensor:
        layer = layer_of(self._architecture, name)
        if layer is None or not self._transforms.touches(layer):
            return self._ends[name] if name in self._ends else self._weights[name]
        if name not in self._names:
            raise KeyError(name)
        if self._folded[0] != layer:
            self._folded = (-1, {})  # first: two layers need not be in memory at once
            # Whoever keeps a gain of each layer (a graph does) pins the heap between its matrices: the allocator would
            # keep the pieces, and the next layer fits into none of them.
            return_freed_memory()
            # Read in the middle of a forward, the weights must be fit for a gradient that somebody takes later.
            with torch.inference_mode(False), torch.no_grad():
                done = _folded_layer(self._architecture, self._dimensions, self._weights, self._transforms, layer)
            self._folded = (layer, done)
        return self._folded[1][name] if name in self._folded[1] else self._weights[name]


def _folded_layer(
    architecture: Architecture,
    dimensions: Dimensions,
    weights: Mapping[str, Tensor],
    transforms: Transforms,
    index: int,
) -> dict[str, Tensor]:
    """The weights of one layer that change."""
    layer = _Layer(architecture, weights, index)
    _fold_diagonals(layer, dimensions, transforms.diagonals_before)
    if transforms.residual_rotation is not None:
        _rotate_residual(layer, transforms.residual_rotation.to(torch.float64))
    if index in transforms.head_rotations:
        _rotate_heads(layer, dimensions, transforms.head_rotations[index].to(torch.float64))
    _fold_diagonals(layer, dimensions, transforms.diagonals)
    _fold_online(layer, transforms.online)
    return layer.rounded()


class _Layer:
    """The weights of one decoder layer in float64, made when first read; paths are relative to the layer."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor], index: int) -> None:
        self.architecture = architecture
        self.index = index
        self._weights = weights
        self._exact: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def weight(self, path: str) -> Tensor:
        """The weight of `path`; a norm's is its gain, offset included."""
        name = self._name(path, "weight")
        if name not in self._exact:
            given = _present(self._weights, name)
            self._dtypes[name] = given.dtype
            self._exact[name] = given.to(torch.float64) + self._offset(path)
        return self._exact[name]

    def bias(self, path: str) -> Tensor | None:
        """The bias of `path`; None where it has none."""
        name = self._name(path, "bias")
        if name in self._weights and name not in self._exact:
            given = self._weights[name]
            self._dtypes[name] = given.dtype
            self._exact[name] = given.to(torch.float64)
        return self._exact.get(name)

    def set_weight(self, path: str, value: Tensor) -> None:
        """Replace the weight (or the gain) of `path` by a float64 value."""
        self._exact[self._name(path, "weight")] = value

    def map_outputs(self, path: str, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a linear `function` of output channels to the weight (`[N, K]` or a gain) and bias (`[N]`)."""
        self.set_weight(path, function(self.weight(path)))
        bias = self.bias(path)
        if bias is not None:
            self._exact[self._name(path, "bias")] = function(bias)

    def rounded(self) -> dict[str, Tensor]:
        """What was read, in the dtype of the checkpoint, under checkpoint names."""
        offset = {self._name(norm, "weight"): self.architecture.norm_offset for norm in self.architecture.norms}
        return {name: (exact - offset.get(name, 0.0)).to(self._dtypes[name]) for name, exact in self._exact.items()}

    def _offset(self, path: str) -> float:
        return self.architecture.norm_offset if self.architecture.is_norm(path) else 0.0

    def _name(self, path: str, leaf: str) -> str:
        return f"{self.architecture.layer_path(self.index, path)}.{leaf}"


def _present(weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise ValueError(f"weight {name} is missing; fold takes the canonical weights of the whole model")
    return weights[name]


def _fold_diagonals(layer: _Layer, dimensions: Dimensions, diagonals: Diagonals) -> None:
    for edge in layer.architecture.edges:
        scale = diagonals.get((layer.index, edge.name))
        if scale is not None:
            _fold_edge(layer, dimensions, edge, scale.to(torch.float64))


def _fold_edge(layer: _Layer, dimensions: Dimensions, edge: Edge, scale: Tensor) -> None:
    inverse = 1 / expand(edge, dimensions, scale)
    for path in edge.producers:
        layer.map_outputs(path, lambda rows: _scale(rows, scale))
    for path in edge.consumers:
        if edge.consumer_side is Side.OUTPUT:
            layer.map_outputs(path, lambda rows: _scale(rows, inverse))
        else:
            layer.set_weight(path, layer.weight(path) * inverse)


def _fold_online(layer: _Layer, online: Mapping[tuple[int, str], OnlineTransform]) -> None:
    for edge in layer.architecture.edges:
        transform = online.get((layer.index, edge.name))
        if transform is None:
            continue
        matrix = hadamard(transform.hadamard_size)
        for path in edge.consumers:
            weight = layer.weight(path)
            if transform.kronecker is not None:
                layer.set_weight(path, unapply_kronecker(weight, transform.kronecker))
                continue
            turns = interleaved(weight, transform.interleave)
            rotated = (turns.reshape(weight.shape[0], -1, transform.hadamard_size) @ matrix).reshape(weight.shape)
            if transform.diagonal is not None:
                rotated = rotated / torch.from_numpy(transform.diagonal).to(torch.float64)
            layer.set_weight(path, rotated)


def online_by_path(architecture: Architecture, transforms: Transforms) -> dict[str, OnlineTransform]:
    """Canonical path of each linear -> the online transform of its inputs."""
    return {
        architecture.layer_path(layer, path): transform
        for (layer, name), transform in transforms.online.items()
        for path in architecture.edge(name).consumers
    }


def _scale(rows: Tensor, scale: Tensor) -> Tensor:
    return rows * (scale[:, None] if rows.dim() == 2 else scale)


def _rotate_residual(layer: _Layer, rotation: Tensor) -> None:
    for norm, readers in layer.architecture.residual_readers:
        gain = layer.weight(norm)
        for path in readers:
            layer.set_weight(path, (layer.weight(path) * gain) @ rotation)
        layer.set_weight(norm, torch.ones_like(gain))
    for path in layer.architecture.residual_writers:
        layer.map_outputs(path, lambda rows: rotation.T @ rows)


def _rotate_heads(layer: _Layer, dimensions: Dimensions, rotation: Tensor) -> None:
    edge = layer.architecture.edge("value")
    per_head = rotation.expand(dimensions.kv_heads, -1, -1)
    blocks: Tensor = torch.block_diag(*per_head)  # type: ignore[no-untyped-call]
    inverse = torch.linalg.inv(per_head).transpose(1, 2)
    repeated = inverse.repeat_interleave(dimensions.group, dim=0)
    for path in edge.producers:
        layer.map_outputs(path, lambda rows: blocks.T @ rows)
    for path in edge.consumers:
        weight = layer.weight(path)
        heads = weight.reshape(weight.shape[0], -1, dimensions.head_dim)
        layer.set_weight(path, torch.einsum("nhi,hij->nhj", heads, repeated).reshape(weight.shape))


def _rotate_ends(architecture: Architecture, weights: Mapping[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """The embedding, the final norm and lm_head of the rotated model."""
    names = [f"{path}.weight" for path in (architecture.embedding, architecture.final_norm, architecture.lm_head)]
    embedding, norm = _present(weights, names[0]), _present(weights, names[1])
    head = weights.get(names[2], embedding)
    exact = rotation.to(torch.float64)
    gain = norm.to(torch.float64) + architecture.norm_offset
    return {
        names[0]: _times(embedding, exact),
        names[1]: torch.full_like(norm, 1 - architecture.norm_offset),
        names[2]: _times(head, gain[:, None] * exact),
    }


def _times(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix @ right` computed in float64 a slab of rows at a time, in the dtype of `matrix`."""
    product = torch.empty_like(matrix)
    for start in range(0, matrix.shape[0], ROWS):
        product[start : start + ROWS] = matrix[start : start + ROWS].to(torch.float64) @ right
    return product
