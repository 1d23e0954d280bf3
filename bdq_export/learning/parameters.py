"""The numbers that are learned, all multiplicative: a logarithm each, so that a step is a relative one.

scales      of every quantized weight [N, B]; with one a row also what a diagonal behind the weight would do
diagonals   of every online transform [K]: Λb, between the rotation and the quantizer
gains       of every norm [hidden]: Λa, in front of the rotation
clips       of every site's activations and of the keys and values of every layer
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from bdq_export.calibration.sites import Site, block_sites
from bdq_export.float_model import LinearSlice, locate_linear
from bdq_export.lazy_weights import changed, shape_of
from bdq_export.learning.state import QuantizedModel
from bdq_models import Architecture, Dimensions
from bdq_runtime.packing import QuantizedWeight
from bdq_runtime.specs import ActivationQuantization, OnlineTransform

CLIP_RANGE = (0.2, 1.0)


@dataclass(frozen=True, eq=False)
class Parameters:
    """The learned numbers by what they belong to.

    Attributes:
        scales: canonical weight name -> log factors `[N, B]`, B blocks a row.
        diagonals: first path of a site -> log factors `[K]`.
        gains: norm's module path -> log factors `[hidden]`.
        clips: first path of a site -> clip `[]`.
        key_clips: layer -> clip `[]`.
        value_clips: layer -> clip `[]`.
    """

    scales: Mapping[str, Parameter]
    diagonals: Mapping[str, Parameter]
    gains: Mapping[str, Parameter]
    clips: Mapping[str, Parameter]
    key_clips: Mapping[int, Parameter]
    value_clips: Mapping[int, Parameter]

    def factors(self) -> list[Parameter]:
        """The logarithms."""
        return [*self.scales.values(), *self.diagonals.values(), *self.gains.values()]

    def fractions(self) -> list[Parameter]:
        """The clips, which stay within `CLIP_RANGE`."""
        return [*self.clips.values(), *self.key_clips.values(), *self.value_clips.values()]

    def __iter__(self) -> Iterator[Parameter]:
        yield from self.factors()
        yield from self.fractions()

    def values(self) -> list[Tensor]:
        """Copies of all numbers, in order."""
        return [parameter.detach().clone() for parameter in self]

    def set_values(self, values: Sequence[Tensor]) -> None:
        """Go back to what `values()` gave."""
        with torch.no_grad():
            for parameter, value in zip(self, values, strict=True):
                parameter.copy_(value)

    def clamp_clips(self) -> None:
        """Keep every clip within `CLIP_RANGE`."""
        with torch.no_grad():
            for parameter in self.fractions():
                parameter.clamp_(*CLIP_RANGE)


def initial_parameters(architecture: Architecture, dimensions: Dimensions, state: QuantizedModel) -> Parameters:
    """Parameters that leave `state` as it is."""
    sites = [site.paths[0] for site in all_sites(architecture, dimensions)]
    norms = [*layer_norms(architecture, dimensions), architecture.final_norm]
    linears = [f"{path}.weight" for site in all_sites(architecture, dimensions) for path in site.paths]
    return Parameters(
        scales={name: _zeros(*state.quantized[name].scales.shape) for name in linears if name in state.quantized},
        diagonals={
            path: _zeros(len(diagonal))
            for path in sites
            if path in state.online and (diagonal := state.online[path].diagonal) is not None
        },
        gains={norm: _zeros(*shape_of(state.weights, f"{norm}.weight")) for norm in norms},
        clips={path: _number(state.activations[path].clip) for path in sites if path in state.activations},
        key_clips={layer: _number(spec.key_clip) for layer, spec in state.dynamic_caches.items()},
        value_clips={layer: _number(spec.value_clip) for layer, spec in state.dynamic_caches.items()},
    )


def learned_state(
    architecture: Architecture, dimensions: Dimensions, state: QuantizedModel, parameters: Parameters
) -> QuantizedModel:
    """`state` with what was learned, in the precision in which it is stored (scales: 16 bits)."""
    gains = {}
    for norm, gain in parameters.gains.items():
        before = state.weights[f"{norm}.weight"]
        offset = architecture.norm_offset
        scaled = (before.double() + offset) * gain.detach().double().exp() - offset
        gains[f"{norm}.weight"] = scaled.to(before.dtype)
    weights = changed(state.weights, gains)
    quantized = dict(state.quantized)
    for name, log_factors in parameters.scales.items():
        quantized[name] = _scaled(quantized[name], log_factors)
    activations, online = dict(state.activations), dict(state.online)
    for site in all_sites(architecture, dimensions):
        first = site.paths[0]
        if first in parameters.clips:
            bits = state.activations[first].bits
            found = ActivationQuantization(bits, float(parameters.clips[first].detach()))
            activations.update(dict.fromkeys(site.paths, found))
        if first in parameters.diagonals:
            transform = _scaled_diagonal(state.online[first], parameters.diagonals[first])
            online.update(dict.fromkeys(site.paths, transform))
    kv = dict(state.kv)
    for layer, spec in state.dynamic_caches.items():
        key_clip, value_clip = (
            float(clips[layer].detach()) for clips in (parameters.key_clips, parameters.value_clips)
        )
        kv[layer] = replace(spec, key_clip=key_clip, value_clip=value_clip)
    return QuantizedModel(weights, quantized, activations, online, kv)


def all_sites(architecture: Architecture, dimensions: Dimensions) -> Iterator[Site]:
    """The sites of every block in execution order."""
    for layer in range(dimensions.layers):
        yield from block_sites(architecture, dimensions, layer)


def layer_norms(architecture: Architecture, dimensions: Dimensions) -> list[str]:
    """Module paths of the norms of all blocks."""
    return [architecture.layer_path(layer, norm) for layer in range(dimensions.layers) for norm in architecture.norms]


def modules_of(
    architecture: Architecture, dimensions: Dimensions, site: Site
) -> dict[str, list[tuple[str, LinearSlice]]]:
    """Modules of the torch model that compute a site's linears -> which linears, and where in it each of them lies."""
    found: dict[str, list[tuple[str, LinearSlice]]] = {}
    for path in site.paths:
        place = locate_linear(architecture, dimensions, path)
        found.setdefault(place.module, []).append((path, place))
    return found


def _scaled(weight: QuantizedWeight, log_factors: Tensor) -> QuantizedWeight:
    """Scales times the learned factor, as 16-bit floats hold them; a scale that was not 0 does not become 0."""
    factor = log_factors.detach().double().exp().numpy()
    half = np.finfo(np.float16)
    scaled = weight.scales.astype(np.float64) * factor
    size = np.clip(np.abs(scaled), half.smallest_subnormal, half.max)
    scales = np.where(weight.scales == 0, 0.0, np.copysign(size, scaled)).astype(np.float16).astype(np.float32)
    return QuantizedWeight(weight.codes, scales, weight.zero_points, weight.spec)


def _scaled_diagonal(transform: OnlineTransform, log_factors: Tensor) -> OnlineTransform:
    assert transform.diagonal is not None, "learned only where there is one"
    factor = log_factors.detach().double().exp().numpy()
    return replace(transform, diagonal=(transform.diagonal.astype(np.float64) * factor).astype(np.float32))


def _zeros(*shape: int) -> Parameter:
    return Parameter(torch.zeros(shape))


def _number(value: float) -> Parameter:
    return Parameter(torch.tensor(float(value)))
