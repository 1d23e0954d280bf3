"""A torch model that computes with static uint8 activations, as integer operators will."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module

from bdq_export.calibration.ranges import Range
from bdq_export.float_model import locate_linear
from bdq_models import Architecture, Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOP = 255


@contextmanager
def static_activations(
    model: PreTrainedModel, architecture: Architecture, dimensions: Dimensions, ranges: Mapping[str, Range]
) -> Iterator[None]:
    """Round inputs and outputs of the linears in `ranges` (by canonical path) to 256 steps of their range."""
    with ExitStack() as stack:
        for path, (low, high, out_low, out_high) in ranges.items():
            place = locate_linear(architecture, dimensions, path)
            module = model.get_submodule(place.module)

            def before(_module: Module, inputs: tuple[Tensor, ...], low: float = low, high: float = high) -> Any:
                return (fake_quantize(inputs[0], low, high), *inputs[1:])

            def after(
                _module: Module,
                _inputs: Any,
                output: Tensor,
                rows: slice = slice(place.start, place.stop),
                low: float = out_low,
                high: float = out_high,
            ) -> Tensor:
                output = output.clone()
                output[..., rows] = fake_quantize(output[..., rows], low, high)
                return output

            # The parts of a packed linear share their input: rounding it again changes nothing.
            stack.callback(module.register_forward_pre_hook(before).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def fake_quantize(values: Tensor, low: float, high: float) -> Tensor:
    """`values` on the 256 points of a uint8 grid that covers `[low, high]` and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / _TOP or 1.0
    zero = min(max(round(-low / scale), 0), _TOP)
    codes = torch.round(values.float() / scale).add_(zero).clamp_(0, _TOP)
    return codes.sub_(zero).mul_(scale).to(values.dtype)
