"""The one table of `bdq` operators: names, inputs, outputs and attributes (docs/ops.md says what they compute).

Passes make nodes from it, function bodies and references are looked up by it, and a test compares it with what the
library registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

DOMAIN = "bdq"
VERSION = 2
"""Of the table. 2 added `hadamard_interleave` and `interleave`; models of 1 mean the same.

From 2 on an operator never changes. One that computes something else has a name of its own: a library that lacks a name
leaves the node to the function in the file, which is right, while one that lacks an attribute ignores it, which is
silently wrong, and ONNX Runtime does not compare versions.
"""

FLOAT = "float32"
HALF = "float16"
BYTES = "uint8"
INDEX = "int32"

Attribute = int | float | str


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: in the domain `bdq`.
        inputs: name -> element type, in order; all are required.
        outputs: name -> element type, in order.
        attributes: name -> the value it has when a node leaves it out, or the type of one that a node must give.
    """

    name: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    attributes: Mapping[str, Attribute | type]

    @property
    def required_attributes(self) -> tuple[str, ...]:
        """Names of the attributes without a default."""
        return tuple(name for name, value in self.attributes.items() if isinstance(value, type))


_LINEAR_ATTRIBUTES: Mapping[str, Attribute | type] = {
    "K": int,
    "N": int,
    "weight_bits": int,
    "weight_grid": 0,
    "block_size": 0,
    "activation_bits": int,
    "activation_clip": 1.0,
}
_HADAMARD: Mapping[str, Attribute | type] = {"hadamard_size": int, "hadamard_interleave": 1}
_ATTENTION_ATTRIBUTES: Mapping[str, Attribute | type] = {
    "num_heads": int,
    "kv_num_heads": int,
    "head_size": int,
    "key_bits": int,
    "value_bits": int,
    "key_clip": 1.0,
    "value_clip": 1.0,
    "hadamard": 0,
    "scale": float,
    "softcap": 0.0,
    "local_window_size": -1,
}
_PACKED = {"weight": BYTES, "scales": HALF}
_QKV = {"query": FLOAT, "key": FLOAT, "value": FLOAT}
_CACHE = {"past_key": BYTES, "past_value": BYTES, "seqlens_k": INDEX, "total_sequence_length": INDEX}
_ROTARY = {"cos_cache": FLOAT, "sin_cache": FLOAT}


def _linears() -> list[Operator]:
    found = []
    for rotated, front, transform in (("", {}, {}), ("Hadamard", {"diagonal": FLOAT}, _HADAMARD)):
        for gated, gate in (("", {}), ("Gated", {"gate": "silu"})):
            for biased, back in (("", {}), ("Bias", {"bias": FLOAT})):
                inputs = {"x": FLOAT, **front, **_PACKED, **back}
                attributes = {**_LINEAR_ATTRIBUTES, **transform, **gate}
                found.append(Operator(f"{rotated}{gated}LowBitLinear{biased}", inputs, {"y": FLOAT}, attributes))
    return found


def _attentions() -> list[Operator]:
    outputs = {"output": FLOAT, "present_key": BYTES, "present_value": BYTES}
    return [
        Operator(f"{packed}{rotary}KVAttention", {**front, **_CACHE, **back}, outputs, _ATTENTION_ATTRIBUTES)
        for packed, front in (("", _QKV), ("Packed", {"qkv": FLOAT}))
        for rotary, back in (("", {}), ("Rotary", _ROTARY))
    ]


OPERATORS: Mapping[str, Operator] = MappingProxyType(
    {
        operator.name: operator
        for operator in (
            *_linears(),
            *_attentions(),
            Operator("Hadamard", {"x": FLOAT}, {"y": FLOAT}, {"size": int, "interleave": 1}),
            Operator("DynamicFakeQuantize", {"x": FLOAT}, {"y": FLOAT}, {"bits": int, "clip": 1.0}),
        )
    }
)
"""Every operator by name."""

WEIGHT_BITS = (2, 3, 4, 8)
ACTIVATION_BITS = (3, 4, 8, 16)
KV_BITS = (3, 4, 8)
BLOCK_SIZES = (0, 32, 64, 128, 256)
GATES = ("silu", "gelu_tanh")
MAX_HADAMARD = 4096
