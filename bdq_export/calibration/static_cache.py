"""Scales of a cache that GroupQueryAttention quantizes: one for each channel of a KV head, fixed for all tokens.

A transform could not help such a cache: a factor of a channel is a factor of its scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.fake_quant.attention import attention_inputs
from bdq_export.fake_quant.kv_channels import fake_quantize_channels
from bdq_runtime.specs import StaticKVQuantization

RATIOS = tuple(round(1.0 - 0.05 * step, 2) for step in range(15))
"""1.0 to 0.3."""
STATIC_TOKENS = 8192
"""So many tell the reach of a channel."""
_LEAST = 2.0**-64
"""A scale of a channel that is always 0: its reciprocal is a number, too."""


@dataclass(frozen=True, eq=False)
class Heads:
    """What a layer puts into its cache.

    Attributes:
        key: float32 `[kv_heads, tokens, head_dim]`, after RoPE.
        value: the same of values.
    """

    key: Tensor
    value: Tensor

    def quantization(self, bits: int, search: bool) -> StaticKVQuantization:
        """Scales of `channel_scales`; all processes together."""
        key, value = (channel_scales(each, bits, search).numpy() for each in (self.key, self.value))
        return StaticKVQuantization(bits, key, value)


def observe_heads(runner: BlockRunner, layer: int, hidden: Tensor) -> tuple[Heads, Tensor]:
    """Keys and values of block `layer` for its inputs `hidden`, and its outputs; nothing quantizes the cache here.

    Args:
        runner: of the model.
        layer: index of the block.
        hidden: `[samples, seq_len, hidden_size]`.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def observe(_layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.append((_rows(key), _rows(value)))
        return query, key, value

    with attention_inputs(runner.model, runner.layers, observe):
        outputs = runner.run(layer, hidden)
    return Heads(*(torch.cat(each, dim=1) for each in zip(*seen, strict=True))), outputs


def channel_scales(x: Tensor, bits: int, search: bool = True) -> Tensor:
    """The scale of least squared error of each channel, float32 `[kv_heads, head_dim]`.

    Args:
        x: float32 `[kv_heads, tokens, head_dim]`.
        bits: 4 or 8.
        search: try `RATIOS` of the largest magnitude; otherwise nothing is clipped.
    """
    largest = x.abs().amax(1)
    parallel.largest(largest)
    best = torch.full_like(largest, torch.inf, dtype=torch.float64)
    scales = torch.ones_like(largest)
    for ratio in RATIOS if search else RATIOS[:1]:
        candidate = (largest * (ratio / ((1 << (bits - 1)) - 1))).clamp_min(_LEAST)
        error = (fake_quantize_channels(x, candidate[:, None], bits) - x).double().square().sum(1)
        parallel.add_up(error)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, candidate, scales)
    return scales


def _rows(heads: Tensor) -> Tensor:
    """`[batch, heads, tokens, head_dim]` as `[heads, batch * tokens, head_dim]`."""
    return heads.transpose(0, 1).flatten(1, 2)
