"""What is learned of a block before its weights are rounded: Λa, Λb or P1 ⊗ P2, clips, the reach of each row's grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bdq_export.calibration.sites import block_sites
from bdq_export.learning.parameters import CLIP_RANGE
from bdq_export.transform import Transforms
from bdq_export.transform.channels import expand, tie
from bdq_export.transform.kronecker import condition, factors_of
from bdq_export.transform.transforms import CONDITION
from bdq_models import Architecture, Dimensions, Edge, Side
from bdq_runtime.specs import ActivationQuantization, Kronecker, KVQuantization

_FASTER_CLIPS = 10.0
_WIDEST = 0.98
"""The clip that a sigmoid starts from at most, near FlatQuant's sigmoid(4)."""


@dataclass(frozen=True, eq=False)
class BlockParameters:
    """The learned numbers of a block; logarithms, but for matrices and clips.

    Attributes:
        before: edge name -> log factors of its free channels: Λa where a rotation follows, else the only diagonal.
        after: edge name -> log factors of its consumers' channels behind the online rotation: Λb.
        rows: path of a linear -> log of what its rows' grids cover, `[N, 1]`, beside what a search found.
        clips: first path of a site -> clip `[]`.
        cache: clips of keys and of values, `[2]`.
        factors: edge name -> the matrices `[n1, n1]` and, unless it is the identity, `[n2, n2]` of its online Kronecker
            product.
        heads: what the transform of value heads is multiplied with, `[head_dim, head_dim]`; None leaves it alone.
        sigmoid: `clips` and `cache` are what a sigmoid makes clips of, learned ten times as fast (FlatQuant).
    """

    before: Mapping[str, Parameter]
    after: Mapping[str, Parameter]
    rows: Mapping[str, Parameter]
    clips: Mapping[str, Parameter]
    cache: Parameter
    factors: Mapping[str, tuple[Parameter, ...]] = field(default_factory=dict)
    heads: Parameter | None = None
    sigmoid: bool = False

    def __iter__(self) -> Iterator[Parameter]:
        for group in (self.before, self.after, self.rows, self.clips):
            yield from group.values()
        yield self.cache
        for matrices in self.factors.values():
            yield from matrices
        if self.heads is not None:
            yield self.heads

    def kronecker(self, name: str) -> tuple[Tensor, Tensor | None]:
        """The present factors of edge `name`; None for the identity."""
        left, *right = self.factors[name]
        return left, right[0] if right else None

    def well_conditioned(self) -> bool:
        """Whether every matrix can be folded (see `transforms.CONDITION`)."""
        products = [*self.factors.values(), *([] if self.heads is None else [(self.heads,)])]
        return all(condition(product) <= CONDITION for product in products)

    def values(self) -> list[Tensor]:
        """Copies of all numbers, in order."""
        return [parameter.detach().clone() for parameter in self]

    def set_values(self, values: list[Tensor]) -> None:
        """Go back to what `values()` gave."""
        with torch.no_grad():
            for parameter, value in zip(self, values, strict=True):
                parameter.copy_(value)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """What an optimizer learns, and how fast."""
        if not self.sigmoid:
            return [{"params": list(self), "lr": rate}]
        clips = [*self.clips.values(), self.cache]
        ids = {id(parameter) for parameter in clips}
        others = [parameter for parameter in self if id(parameter) not in ids]
        return [{"params": others, "lr": rate}, {"params": clips, "lr": _FASTER_CLIPS * rate}]

    def clip(self, first: str) -> Tensor:
        """The clip `[]` of the site whose first linear is `first`."""
        return self.clips[first].sigmoid() if self.sigmoid else self.clips[first]

    def cache_clips(self) -> Tensor:
        """Clips of keys and of values `[2]`."""
        return self.cache.sigmoid() if self.sigmoid else self.cache

    def clamp_clips(self) -> None:
        """Keep every clip within `CLIP_RANGE`, where no sigmoid does."""
        if self.sigmoid:
            return
        with torch.no_grad():
            for parameter in (*self.clips.values(), self.cache):
                parameter.clamp_(*CLIP_RANGE)


def block_parameters(
    architecture: Architecture,
    dimensions: Dimensions,
    layer: int,
    transforms: Transforms,
    activation: ActivationQuantization | None,
    cache: KVQuantization | None,
) -> BlockParameters:
    """Parameters that leave the block as `transforms` made it.

    Args:
        architecture: its family.
        dimensions: its sizes.
        layer: index of the block.
        transforms: of the model; edges without any part of one are left alone.
        activation: where clips of activations start; None leaves activations float.
        cache: where clips of the cache start; None leaves it float.
    """
    online = [edge for edge in architecture.edges if (layer, edge.name) in transforms.online]
    diagonal = [
        edge
        for edge in architecture.edges
        if (edge in online and transforms.online[layer, edge.name].kronecker is None)
        or (layer, edge.name) in {**transforms.diagonals, **transforms.diagonals_before}
    ]
    products = [edge for edge in online if transforms.online[layer, edge.name].kronecker is not None]
    sites = block_sites(architecture, dimensions, layer)

    def start(*clips: float) -> Parameter:
        found = torch.tensor(clips[0] if len(clips) == 1 else clips)
        return Parameter(torch.logit(found.clamp(max=_WIDEST)) if products else found)

    return BlockParameters(
        before={edge.name: Parameter(torch.zeros(dimensions.free_channels(edge))) for edge in diagonal},
        after={
            edge.name: Parameter(torch.zeros(dimensions.input_size(edge.consumers[0])))
            for edge in online
            if transforms.online[layer, edge.name].diagonal is not None
        },
        rows={path: Parameter(torch.zeros(dimensions.output_size(path), 1)) for path in architecture.linears},
        clips={} if activation is None else {site.paths[0]: start(activation.clip) for site in sites},
        cache=start(*([1.0, 1.0] if cache is None else [cache.key_clip, cache.value_clip])),
        factors={edge.name: _factors(transforms.online[layer, edge.name].kronecker) for edge in products},
        heads=Parameter(torch.eye(dimensions.head_dim)) if products and layer in transforms.head_rotations else None,
        sigmoid=bool(products),
    )


def _factors(kronecker: Kronecker | None) -> tuple[Parameter, ...]:
    assert kronecker is not None, "learned only where there is one"
    return tuple(Parameter(each.clone()) for each in factors_of(kronecker, torch.float32) if each is not None)


def factors(edge: Edge, dimensions: Dimensions, log_factors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of an edge's producers `[F]` and the inverse ones of its consumers, tied and repeated as it asks."""
    scale = tie(edge, dimensions, log_factors.exp())
    return scale, 1 / expand(edge, dimensions, scale)


def learned_transforms(
    architecture: Architecture, dimensions: Dimensions, layer: int, transforms: Transforms, parameters: BlockParameters
) -> Transforms:
    """`transforms` with what was learned of block `layer`, in float64."""
    before, after = dict(transforms.diagonals_before), dict(transforms.diagonals)
    online = dict(transforms.online)
    for name, log_factors in parameters.before.items():
        edge, key = architecture.edge(name), (layer, name)
        scale, _ = factors(edge, dimensions, log_factors.detach().double())
        # Behind a folded rotation (value heads) it is its Λb that was learned.
        behind = edge is architecture.edge("value") and layer in transforms.head_rotations
        target = before if key in online and not behind else after
        target[key] = target[key] * scale if key in target else scale
    for name, log_factors in parameters.after.items():
        transform = online[layer, name]
        assert transform.diagonal is not None, "learned only where there is one"
        scaled = torch.from_numpy(transform.diagonal).double() * log_factors.detach().double().exp()
        online[layer, name] = replace(transform, diagonal=scaled.float().numpy())
    for name in parameters.factors:
        left, right = (None if each is None else each.detach().numpy().copy() for each in parameters.kronecker(name))
        assert left is not None, "only the right factor may be the identity"
        online[layer, name] = replace(online[layer, name], kronecker=Kronecker(left, right))
    heads = dict(transforms.head_rotations)
    if parameters.heads is not None:
        heads[layer] = heads[layer].double() @ parameters.heads.detach().double()
    return replace(transforms, diagonals=after, diagonals_before=before, online=online, head_rotations=heads)


def is_input(edge: Edge) -> bool:
    """Whether the consumers of `edge` are scaled on their inputs."""
    return edge.consumer_side is Side.INPUT
