"""Records of what calibration decides: transforms and quantized weights, bit by bit and in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bdq_export.resume.record import Record
from bdq_export.transform import Transforms
from bdq_runtime.packing import PerBlock, PerChannel, QuantizedWeight, QuantSpec
from bdq_runtime.specs import Kronecker, OnlineTransform

_DIAGONALS = ("diagonals", "diagonals_before")


def quantized_record(weights: Mapping[str, QuantizedWeight]) -> Record:
    """The record of weights by canonical name."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{name}:codes"] = torch.from_numpy(weight.codes)
        tensors[f"{name}:scales"] = torch.from_numpy(weight.scales)
        if weight.zero_points is not None:
            tensors[f"{name}:zero_points"] = torch.from_numpy(weight.zero_points)
    return Record({"specs": [[name, *_spec_values(weight.spec)] for name, weight in weights.items()]}, tensors)


def quantized_from(record: Record) -> dict[str, QuantizedWeight]:
    """What `quantized_record` recorded.

    Raises:
        ValueError, KeyError, TypeError: the record is another one.
    """
    found = {}
    for name, *spec in record.values["specs"]:
        zeros = record.tensors.get(f"{name}:zero_points")
        found[name] = QuantizedWeight(
            record.tensors[f"{name}:codes"].numpy(),
            record.tensors[f"{name}:scales"].numpy(),
            None if zeros is None else zeros.numpy(),
            _spec_from(*spec),
        )
    return found


def transforms_record(transforms: Transforms) -> Record:
    """The record of a model's transforms, or of some of its layers'."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for kind in _DIAGONALS:
        diagonals: Mapping[tuple[int, str], Tensor] = getattr(transforms, kind)
        values[kind] = [list(key) for key in diagonals]
        tensors.update({f"{kind}:{layer}:{edge}": value for (layer, edge), value in diagonals.items()})
    values["head_rotations"] = list(transforms.head_rotations)
    tensors.update({f"head_rotations:{layer}": value for layer, value in transforms.head_rotations.items()})
    if transforms.residual_rotation is not None:
        tensors["residual_rotation"] = transforms.residual_rotation
    values["online"] = [[*key, online.hadamard_size, online.interleave] for key, online in transforms.online.items()]
    for (layer, edge), online in transforms.online.items():
        if online.diagonal is not None:
            tensors[f"online:{layer}:{edge}"] = torch.from_numpy(online.diagonal)
        if online.kronecker is not None:
            tensors[f"online_left:{layer}:{edge}"] = torch.from_numpy(online.kronecker.left)
            if online.kronecker.right is not None:
                tensors[f"online_right:{layer}:{edge}"] = torch.from_numpy(online.kronecker.right)
    return Record(values, tensors)


def transforms_from(record: Record) -> Transforms:
    """What `transforms_record` recorded.

    Raises:
        ValueError, KeyError, TypeError: the record is another one.
    """
    values, tensors = record.values, record.tensors
    diagonals, before = (
        {(layer, edge): tensors[f"{kind}:{layer}:{edge}"] for layer, edge in values[kind]} for kind in _DIAGONALS
    )
    online = {}
    for layer, edge, size, runs in values["online"]:
        diagonal = tensors.get(f"online:{layer}:{edge}")
        kronecker = _kronecker_from(tensors, layer, edge)
        online[layer, edge] = OnlineTransform(
            size, None if diagonal is None else diagonal.numpy(), kronecker, interleave=runs
        )
    heads = {layer: tensors[f"head_rotations:{layer}"] for layer in values["head_rotations"]}
    return Transforms(diagonals, before, tensors.get("residual_rotation"), heads, online)


def _kronecker_from(tensors: Mapping[str, Tensor], layer: int, edge: str) -> Kronecker | None:
    left, right = (tensors.get(f"online_{side}:{layer}:{edge}") for side in ("left", "right"))
    return None if left is None else Kronecker(left.numpy(), None if right is None else right.numpy())


def _spec_values(spec: QuantSpec) -> list[Any]:
    if isinstance(spec.granularity, PerBlock):
        block = spec.granularity.size
    elif isinstance(spec.granularity, PerChannel):
        block = 0
    else:
        raise ValueError(f"{spec.granularity} is no granularity of a weight")
    return [spec.bits, block, spec.symmetric, spec.grid]


def _spec_from(bits: int, block: int, symmetric: bool, grid: str) -> QuantSpec:
    return QuantSpec(bits, PerBlock(block) if block else PerChannel(), symmetric, grid=grid)
