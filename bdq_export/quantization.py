"""What a graph is quantized with, and the same by the nodes of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from bdq_export.errors import VerificationError
from bdq_export.transform.kronecker import same_kronecker
from bdq_runtime.packing import ODD, QuantizedWeight
from bdq_runtime.specs import (
    ActivationQuantization,
    AnyKVQuantization,
    KVQuantization,
    OnlineTransform,
    StaticKVQuantization,
)

Range = tuple[float, float, float, float]
Nodes = Mapping[str, tuple[str, ...]]
"""Name of a linear node -> canonical paths of the linears that it computes."""
_Value = TypeVar("_Value")


@dataclass(frozen=True, eq=False)
class Quantization:
    """What calibration decided.

    Attributes:
        weights: by canonical name; linears without one stay float.
        ranges: static activation ranges by canonical path, for integer operators.
        activations: dynamic quantization of the inputs of linears, by canonical path.
        online: what linears apply to their inputs first, by canonical path.
        kv: quantization of the cache, by layer.
    """

    weights: Mapping[str, QuantizedWeight]
    ranges: Mapping[str, Range] = field(default_factory=dict)
    activations: Mapping[str, ActivationQuantization] = field(default_factory=dict)
    online: Mapping[str, OnlineTransform] = field(default_factory=dict)
    kv: Mapping[int, AnyKVQuantization] = field(default_factory=dict)

    def activations_of(self, nodes: Nodes) -> dict[str, ActivationQuantization]:
        """`activations` by node name.

        Raises:
            VerificationError: the linears of one node differ, or a path has no node.
        """
        return _by_node(self.activations, nodes, operator.eq)

    def online_of(self, nodes: Nodes) -> dict[str, OnlineTransform]:
        """`online` by node name; raises as `activations_of`."""
        return _by_node(self.online, nodes, _same_transform)

    @property
    def dynamic_caches(self) -> dict[int, KVQuantization]:
        """Those of `kv` that bdq operators quantize."""
        return {layer: cache for layer, cache in self.kv.items() if isinstance(cache, KVQuantization)}

    @property
    def static_caches(self) -> dict[int, StaticKVQuantization]:
        """Those of `kv` that GroupQueryAttention quantizes itself."""
        return {layer: cache for layer, cache in self.kv.items() if isinstance(cache, StaticKVQuantization)}

    def needs_bdq(self, path: str) -> bool:
        """Whether no stock operator multiplies the weights of a linear with its inputs."""
        weight = self.weights.get(f"{path}.weight")
        return weight is not None and (path in self.activations or weight.spec.bits == 3 or weight.spec.grid == ODD)


def _by_node(values: Mapping[str, _Value], nodes: Nodes, equal: Callable[[_Value, _Value], bool]) -> dict[str, _Value]:
    found: dict[str, _Value] = {}
    for name, parts in nodes.items():
        given = [values[part] for part in parts if part in values]
        if given and (len(given) < len(parts) or not all(equal(each, given[0]) for each in given)):
            raise VerificationError(f"the linears {parts} of node {name} differ in what is done to their input")
        if given:
            found[name] = given[0]
    unknown = sorted(set(values) - {part for parts in nodes.values() for part in parts})
    if unknown:
        raise VerificationError(f"{len(unknown)} linears of the calibration have no node, the first is {unknown[0]}")
    return found


def _same_transform(one: OnlineTransform, other: OnlineTransform) -> bool:
    sizes = (one.hadamard_size, one.interleave), (other.hadamard_size, other.interleave)
    if sizes[0] != sizes[1] or (one.diagonal is None) != (other.diagonal is None):
        return False
    if not same_kronecker(one.kronecker, other.kronecker):
        return False
    return one.diagonal is None or other.diagonal is None or bool(np.array_equal(one.diagonal, other.diagonal))
