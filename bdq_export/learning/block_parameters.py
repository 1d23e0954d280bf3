"""What is learned of a block before its weights are rounded: Λa, Λb, clips, and the reach of each row's grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from bdq_export.calibration.sites import block_sites
from bdq_export.learning.parameters import CLIP_RANGE
from bdq_export.transform import Transforms
from bdq_export.transform.channels import expand, tie
from bdq_models import Architecture, Dimensions, Edge, Side
from bdq_runtime.specs import ActivationQuantization, KVQuantization


@dataclass(frozen=True, eq=False)
class BlockParameters:
    """The learned numbers of a block; logarithms, but for the clips.

    Attributes:
        before: edge name -> log factors of its free channels: Λa where a rotation follows, else the only diagonal.
        after: edge name -> log factors of its consumers' channels behind the online rotation: Λb.
        rows: path of a linear -> log of what its rows' grids cover, `[N, 1]`, beside what a search found.
        clips: first path of a site -> clip `[]`.
        cache: clips of keys and of values, `[2]`.
    """

    before: Mapping[str, Parameter]
    after: Mapping[str, Parameter]
    rows: Mapping[str, Parameter]
    clips: Mapping[str, Parameter]
    cache: Parameter

    def __iter__(self) -> Iterator[Parameter]:
        for group in (self.before, self.after, self.rows, self.clips):
            yield from group.values()
        yield self.cache

    def values(self) -> list[Tensor]:
        """Copies of all numbers, in order."""
        return [parameter.detach().clone() for parameter in self]

    def set_values(self, values: list[Tensor]) -> None:
        """Go back to what `values()` gave."""
        with torch.no_grad():
            for parameter, value in zip(self, values, strict=True):
                parameter.copy_(value)

    def clamp_clips(self) -> None:
        """Keep every clip within `CLIP_RANGE`."""
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
        if edge in online or (layer, edge.name) in {**transforms.diagonals, **transforms.diagonals_before}
    ]
    sites = block_sites(architecture, dimensions, layer)
    return BlockParameters(
        before={edge.name: Parameter(torch.zeros(dimensions.free_channels(edge))) for edge in diagonal},
        after={
            edge.name: Parameter(torch.zeros(dimensions.input_size(edge.consumers[0])))
            for edge in online
            if transforms.online[layer, edge.name].diagonal is not None
        },
        rows={path: Parameter(torch.zeros(dimensions.output_size(path), 1)) for path in architecture.linears},
        clips={} if activation is None else {site.paths[0]: Parameter(torch.tensor(activation.clip)) for site in sites},
        cache=Parameter(torch.tensor([1.0, 1.0] if cache is None else [cache.key_clip, cache.value_clip])),
    )


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
        # Behind a folded rotation (value heads) it is Λb that was learned.
        target = before if key in online else after
        target[key] = target[key] * scale if key in target else scale
    for name, log_factors in parameters.after.items():
        transform = online[layer, name]
        assert transform.diagonal is not None, "learned only where there is one"
        scaled = torch.from_numpy(transform.diagonal).double() * log_factors.detach().double().exp()
        online[layer, name] = replace(transform, diagonal=scaled.float().numpy())
    return replace(transforms, diagonals=after, diagonals_before=before, online=online)


def is_input(edge: Edge) -> bool:
    """Whether the consumers of `edge` are scaled on their inputs."""
    return edge.consumer_side is Side.INPUT
