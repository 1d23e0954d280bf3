"""Static ranges of what goes into and comes out of every linear, for integer deployment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.float_model import LinearSlice, locate_linear
from bdq_export.progress import Progress
from bdq_models import Architecture, Dimensions

Range = tuple[float, float, float, float]
"""Smallest and largest input, smallest and largest output of a linear (bias included)."""


def observe_ranges(
    runner: BlockRunner, architecture: Architecture, dimensions: Dimensions, progress: Progress
) -> dict[str, Range]:
    """Canonical path of each linear of the decoder blocks -> its range over the runner's tokens.

    The model computes with what it holds: quantized weights give the ranges that integer kernels will see.
    """
    ranges: dict[str, Range] = {}
    hidden = runner.embedded()
    with progress.stage("activation ranges", total=dimensions.layers) as stage:
        for layer in range(dimensions.layers):
            places = {
                path: locate_linear(architecture, dimensions, path)
                for path in (architecture.layer_path(layer, linear) for linear in architecture.linears)
            }
            with ExitStack() as stack:
                for module in {place.module for place in places.values()}:
                    hook = _hook({path: place for path, place in places.items() if place.module == module}, ranges)
                    handle = runner.model.get_submodule(module).register_forward_hook(hook)
                    stack.callback(handle.remove)
                hidden = runner.run(layer, hidden)
            stage.advance()
    # As maxima: the largest, and the negated least.
    ends = torch.tensor([[-low, high, -out_low, out_high] for low, high, out_low, out_high in ranges.values()])
    parallel.largest(ends)
    return {path: (-row[0], row[1], -row[2], row[3]) for path, row in zip(ranges, ends.double().tolist(), strict=True)}


def merge_ranges(ranges: Mapping[str, Range], nodes: Mapping[str, Sequence[str]]) -> dict[str, Range]:
    """Ranges of linears that a graph computes together: node name -> the union over its logical parts.

    Args:
        ranges: by canonical path.
        nodes: node name -> canonical paths of its parts; nodes with a part that has no range are left out.
    """
    return {
        name: _union([ranges[part] for part in parts])
        for name, parts in nodes.items()
        if all(part in ranges for part in parts)
    }


def _union(ranges: Iterable[Range]) -> Range:
    low, high, out_low, out_high = zip(*ranges, strict=True)
    return min(low), max(high), min(out_low), max(out_high)


def _hook(places: Mapping[str, LinearSlice], ranges: dict[str, Range]) -> Callable[[Module, Any, Tensor], None]:
    def hook(_module: Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        low, high = torch.aminmax(inputs[0])
        for path, place in places.items():
            out_low, out_high = torch.aminmax(output[..., place.start : place.stop])
            seen = (float(low), float(high), float(out_low), float(out_high))
            ranges[path] = _union([ranges[path], seen]) if path in ranges else seen

    return hook
