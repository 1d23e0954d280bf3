"""From the free channels of an edge to the channels of its consumers, and back.

A diagonal of an edge has one factor for each output channel of its producers: the *free* channels. Consumers of
`value` and `key_query` see them repeated over the query heads of a group: free channel `kv * head_dim + i` is
consumer channel `(kv * group + g) * head_dim + i` for each g.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bdq_models import Dimensions, Edge, Side, Tie


def consumer_channels(edge: Edge, dimensions: Dimensions) -> int:
    """Number of channels that the consumers of `edge` see."""
    consumer = edge.consumers[0]
    input_side = edge.consumer_side is Side.INPUT
    return dimensions.input_size(consumer) if input_side else dimensions.output_size(consumer)


def expand(edge: Edge, dimensions: Dimensions, scale: Tensor) -> Tensor:
    """The factors of the consumers' channels, from those of the free channels `[F]`: `[F]` or `[F * group]`."""
    if scale.numel() == consumer_channels(edge, dimensions):
        return scale
    heads = scale.reshape(dimensions.kv_heads, 1, dimensions.head_dim)
    return heads.expand(-1, dimensions.group, -1).reshape(-1)


def reduce(edge: Edge, dimensions: Dimensions, energy: Tensor) -> Tensor:
    """Energies of the free channels, from those of the consumers' `[F * group]`: summed over each group.

    The adjoint of `expand`. An edge without repetition returns `energy` unchanged.
    """
    if dimensions.free_channels(edge) == consumer_channels(edge, dimensions):
        return energy
    return energy.reshape(dimensions.kv_heads, dimensions.group, dimensions.head_dim).sum(1).reshape(-1)


def tie(edge: Edge, dimensions: Dimensions, scale: Tensor) -> Tensor:
    """`scale` of the free channels `[F]`, with the geometric mean in both channels of each RoPE pair."""
    if edge.tie is not Tie.ROPE_PAIRS:
        return scale
    tied = scale.clone()
    first, second = _pairs(dimensions, tied)
    mean = first.sqrt() * second.sqrt()
    first.copy_(mean)
    second.copy_(mean)
    return tied


def tie_mean(edge: Edge, dimensions: Dimensions, energy: Tensor) -> Tensor:
    """`energy` of the free channels `[F]`, with the mean in both channels of each RoPE pair, which RoPE preserves."""
    if edge.tie is not Tie.ROPE_PAIRS:
        return energy
    tied = energy.clone()
    first, second = _pairs(dimensions, tied)
    mean = (first + second) / 2
    first.copy_(mean)
    second.copy_(mean)
    return tied


def is_tied(edge: Edge, dimensions: Dimensions, scale: Tensor) -> bool:
    """Whether both channels of each RoPE pair have the same factor (1e-12), where the edge asks for it."""
    if edge.tie is not Tie.ROPE_PAIRS:
        return True
    first, second = _pairs(dimensions, scale)
    return torch.allclose(first, second, rtol=1e-12, atol=0)


def _pairs(dimensions: Dimensions, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the first and the second channels of all RoPE pairs, `[heads, rotary_dim/2]` each."""
    half = dimensions.rotary_dim // 2
    heads = scale.view(-1, dimensions.head_dim)
    return heads[:, :half], heads[:, half : 2 * half]
