"""Quantizers with gradients: the values of `fake_quant`, derivatives straight through the rounding.

Inside of the grid a rounded value moves as its input does; outside it moves with the end of the grid, which is what a
clip learns from. The largest |x| of a token, from which its step comes, is taken as given, but by `token_values`:
what makes it smaller is what a rotation learns from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bdq_export.fake_quant.activations import quantize_tokens
from bdq_export.fake_quant.hadamard import sylvester_product
from bdq_export.fake_quant.kv_channels import fake_quantize_channels
from bdq_export.fake_quant.kv_rows import quantize_rows
from bdq_export.transform.hadamard import interleaved
from bdq_runtime.specs import OnlineTransform


def token_codes(x: Tensor, clip: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Integers `[..., K]` and steps `[..., 1]` float32 of `x` `[..., K]` float32.

    Args:
        x: rows are tokens.
        clip: a number `[]`; gets a gradient.
        bits: 3, 4 or 8.
        dtype: of the integers; bfloat16 holds them exactly.
    """
    codes, steps = _TokenCodes.apply(x, clip, bits, dtype)  # type: ignore[no-untyped-call]
    return codes, steps


def token_values(x: Tensor, bits: int, clip: float) -> Tensor:
    """The values `[..., K]` that `token_codes` stand for, with the gradient of their steps by `x`.

    The derivatives are those of `fake_quantize_tokens` with `straight_through` rounding, in fewer passes over memory.

    Args:
        x: rows are tokens, float32.
        bits: 3, 4 or 8.
        clip: part of the largest |x| of a row that the grid covers.
    """
    values: Tensor = _TokenValues.apply(x, bits, clip)  # type: ignore[no-untyped-call]
    return values


def row_values(x: Tensor, clip: Tensor, bits: int) -> Tensor:
    """The values that rows `x` `[..., D]` float32 of keys or values have when they come back from the cache.

    Args:
        x: rows are heads of tokens.
        clip: a number `[]`; gets a gradient.
        bits: 3, 4 or 8.
    """
    values: Tensor = _RowValues.apply(x, clip, bits)  # type: ignore[no-untyped-call]
    return values


def channel_values(x: Tensor, steps: Tensor, bits: int) -> Tensor:
    """The values that keys or values `x` `[..., kv_heads, tokens, D]` float32 have in a cache of static scales.

    Args:
        x: heads of tokens.
        steps: of `fake_quant.kv_channels.channel_steps`.
        bits: 4 or 8.
    """
    values: Tensor = _ChannelValues.apply(x, steps, bits)  # type: ignore[no-untyped-call]
    return values


def rotate(x: Tensor, size: int) -> Tensor:
    """`x H / sqrt(size)` in blocks of `size` channels, without the integer grid of `online_hadamard` (2^-18 apart)."""
    rotated: Tensor = sylvester_product(x, size) * size**-0.5
    return rotated


def rotate_online(x: Tensor, transform: OnlineTransform) -> Tensor:
    """The Hadamard transform of `transform`, in its order of channels, without its diagonal."""
    return rotate(interleaved(x, transform.interleave), transform.hadamard_size)


def rotate_back(x: Tensor, transform: OnlineTransform) -> Tensor:
    """The inverse of `rotate_online`."""
    return interleaved(rotate(x, transform.hadamard_size), x.shape[-1] // transform.interleave)


class _TokenCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        codes, steps = quantize_tokens(x, bits, float(clip))
        ctx.save_for_backward(x, steps, clip)
        ctx.bits = bits
        return codes.to(dtype), steps

    @staticmethod
    def backward(ctx: Any, code_gradient: Tensor, step_gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, steps, clip = ctx.saved_tensors
        half = 1 << (ctx.bits - 1)
        values = x * (1.0 / steps)
        inside = code_gradient.float() * ((values >= -half) & (values <= half - 1))
        by_step = step_gradient - (inside * values).sum(-1, keepdim=True) / steps
        # The step is proportional to the clip.
        return inside / steps, ((by_step * steps).sum() / clip).reshape(clip.shape), None, None


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int, clip: float) -> Tensor:
        codes, steps = quantize_tokens(x, bits, clip)
        half = 1 << (bits - 1)
        exact = x * (1.0 / steps)
        inside = (exact >= -half - 0.5) & (exact <= half - 0.5)
        # d value / d step: the code, less the share that the code itself gives back inside of the grid.
        by_step = codes - exact.mul_(inside)
        where = x.abs().argmax(-1, keepdim=True)
        ctx.save_for_backward(inside, by_step, where, x.gather(-1, where).sign() * (clip / (half - 1)))
        return codes.mul_(steps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        inside, by_step, where, by_largest = ctx.saved_tensors
        steps = (gradient * by_step).sum(-1, keepdim=True)
        return (gradient * inside).scatter_add_(-1, where, steps * by_largest), None, None


class _RowValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, clip: Tensor, bits: int) -> Tensor:
        rows = quantize_rows(x, bits, float(clip))
        ctx.save_for_backward(x, rows.codes, rows.zeros, rows.scales, clip)
        ctx.bits = bits
        return rows.values()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, codes, zeros, scales, clip = ctx.saved_tensors
        top = (1 << ctx.bits) - 1
        exact = x / scales + zeros
        inside = (exact >= -0.5) & (exact <= top + 0.5)
        # d value / d scale: code - zero, less the share that the code itself gives back inside of the grid.
        by_scale = gradient * torch.where(inside, codes - exact, codes - zeros)
        return gradient * inside, ((by_scale * scales).sum() / clip).reshape(clip.shape), None


class _ChannelValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: Tensor, bits: int) -> Tensor:
        half = 1 << (bits - 1)
        exact = x * (1.0 / steps)
        ctx.save_for_backward((exact >= -half - 0.5) & (exact <= half - 0.5))
        return fake_quantize_channels(x, steps, bits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None
