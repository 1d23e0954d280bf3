"""Lower attention to the `bdq` operators whose KV cache holds few bits."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.graph_edit import required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level
from bdq_runtime.opset import KV_BITS, Attribute
from bdq_runtime.specs import KVQuantization

GQA = "GroupQueryAttention"
PAST_KEY, PAST_VALUE, _LENGTHS, _TOTAL, _COS, _SIN = 3, 4, 5, 6, 7, 8
_LAYER = re.compile(r"past_key_values\.(\d+)\.key")
_ROW_HEAD = 4
"""Bytes of scale and zero point in a row of the cache."""
_KEPT = ("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size")
_READ = {"do_rotary", "rotary_interleaved"}


@dataclass(frozen=True)
class LowerToKVAttentionPass(GraphPass):
    """Replace GroupQueryAttention by `bdq::[Packed][Rotary]KVAttention` and give the cache its type.

        GroupQueryAttention(qkv, -, -, past_key, past_value, lengths, total, cos, sin)  {do_rotary: 1}
        ->
        PackedRotaryKVAttention(qkv, past_key, past_value, lengths, total, cos, sin)

    without `Packed` for three inputs, without `Rotary` for `do_rotary: 0`. Graph inputs and outputs of the cache become
    uint8 `[batch, kv heads, positions, row]`, `row = head size * bits / 8 + 4`, under the names that they have.

    Requires QUANTIZED, ensures QUANTIZED. A second run changes nothing, so it must be given no caches.

    Attributes:
        caches: layer -> how its cache is quantized; each layer must be there. Other layers keep a float cache.
    """

    name: ClassVar[str] = "lower-to-kv-attention"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    caches: Mapping[int, KVQuantization] = field(repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the layers.

        Raises:
            ValueError: a layer without attention, an attention that the operators do not have (other inputs or
                attributes, a head size that is no multiple of 8), or bits or clips that they do not have.
        """
        found = attention_layers(model, self.caches)
        for layer, cache in self.caches.items():
            _check(layer, cache)
            _lower(model, found[layer], cache)
        return ir.passes.PassResult(model, modified=bool(self.caches))


def attention_layers(model: ir.Model, wanted: Collection[int]) -> dict[int, ir.Node]:
    """The GroupQueryAttention of each layer, by the name of its cache.

    Raises:
        ValueError: a layer of `wanted` has none.
    """
    found = {layer: node for node in model.graph if (layer := _layer(node)) is not None}
    missing = sorted(set(wanted) - set(found))
    if missing:
        raise ValueError(f"{len(missing)} layers to get a quantized cache have no {GQA}, the first is {missing[0]}")
    return found


def _layer(node: ir.Node) -> int | None:
    """The layer of a GroupQueryAttention, by the name of its cache."""
    if node.op_type != GQA:
        return None
    match = _LAYER.fullmatch(str(required_input(node, PAST_KEY).name))
    return None if match is None else int(match[1])


def _check(layer: int, cache: KVQuantization) -> None:
    if cache.key_bits not in KV_BITS or cache.value_bits not in KV_BITS:
        raise ValueError(f"layer {layer}: a cache of {cache.key_bits} and {cache.value_bits} bits, expected {KV_BITS}")
    for clip in (cache.key_clip, cache.value_clip):
        if not 0 < clip <= 1:
            raise ValueError(f"layer {layer}: cache clip {clip}, expected more than 0 and at most 1")


def _lower(model: ir.Model, node: ir.Node, cache: KVQuantization) -> None:
    size = _head_size(node, cache)
    rotary = _flag(node, "do_rotary")
    packed = node.inputs[1] is None
    inputs = [required_input(node, index) for index in ((0,) if packed else (0, 1, 2))]
    past_key, past_value = required_input(node, PAST_KEY), required_input(node, PAST_VALUE)
    inputs += [past_key, past_value, required_input(node, _LENGTHS), required_input(node, _TOTAL)]
    if rotary:
        inputs += [required_input(node, index) for index in (_COS, _SIN)]
    operator = f"{'Packed' if packed else ''}{'Rotary' if rotary else ''}KVAttention"
    lowered = bdq_node(model, operator, inputs, _attributes(node, cache, size), str(node.name))
    lowered.metadata_props.update(node.metadata_props)
    assert node.graph is not None, "the node belongs to the graph that it was found in"
    node.graph.insert_before(node, lowered)
    for source, target in zip(node.outputs, lowered.outputs, strict=True):
        name, target.type, target.shape = str(source.name), source.type, source.shape
        source.replace_all_uses_with(target, replace_graph_outputs=True)
        source.name, target.name = f"{name}/float", name
    node.graph.remove(node, safe=True)
    for past, present, bits in zip(
        (past_key, past_value), lowered.outputs[1:], (cache.key_bits, cache.value_bits), strict=True
    ):
        for value in (past, present):
            _retype(value, size * bits // 8 + _ROW_HEAD)


def _head_size(node: ir.Node, cache: KVQuantization) -> int:
    shape = required_input(node, PAST_KEY).shape
    size = None if shape is None or len(shape) != 4 else shape[3]
    if not isinstance(size, int) or size % 8:
        raise ValueError(f"node {node.name}: a head size of {size}, a quantized cache needs a multiple of 8")
    if cache.hadamard and size & (size - 1):
        raise ValueError(f"node {node.name}: a head size of {size}, its Hadamard transform needs a power of two")
    return size


def _attributes(node: ir.Node, cache: KVQuantization, size: int) -> dict[str, Attribute]:
    """Attributes of the new node.

    Raises:
        ValueError: the old one says something that the new one cannot.
    """
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    unknown = sorted(
        name for name, value in given.items() if name not in (*_KEPT, *_READ) and value not in (0, 0.0, -1)
    )
    extra = [value for value in node.inputs[_SIN + 1 :] if value is not None]
    if unknown or extra or given.get("rotary_interleaved", 0):
        raise ValueError(
            f"node {node.name}: {GQA} with {unknown or extra or 'interleaved RoPE'}, which a quantized cache has not"
        )
    return {
        "scale": size**-0.5,
        **{name: given[name] for name in _KEPT if name in given},
        "head_size": size,
        "key_bits": cache.key_bits,
        "value_bits": cache.value_bits,
        "key_clip": cache.key_clip,
        "value_clip": cache.value_clip,
        "hadamard": int(cache.hadamard),
    }


def _flag(node: ir.Node, name: str) -> bool:
    attribute = node.attributes.get(name)
    return attribute is not None and bool(attribute.as_int())


def _retype(value: ir.Value, row: int) -> None:
    shape = value.shape
    assert shape is not None, "caches are graph inputs and outputs, whose shapes are declared"
    value.type, value.shape = ir.TensorType(ir.DataType.UINT8), ir.Shape([*shape[:3], row])
