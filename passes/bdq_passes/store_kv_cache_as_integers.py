"""Let GroupQueryAttention hold its cache in 4 or 8 bits, which it can by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_passes.graph_edit import initializer, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level
from bdq_passes.lower_to_kv_attention import GQA, PAST_KEY, PAST_VALUE, attention_layers
from bdq_runtime.specs import StaticKVQuantization

_KEY_SCALE, _VALUE_SCALE, _INPUTS = 12, 13, 14
_TYPES = {8: (ir.DataType.INT8, 1), 4: (ir.DataType.UINT8, 2)}
"""Bits -> element type of the cache, and channels in one element."""


@dataclass(frozen=True)
class StoreKVCacheAsIntegersPass(GraphPass):
    """Give GroupQueryAttention static scales of channels, and its cache the type that it then has.

        GroupQueryAttention(..., past_key, past_value, ...)
        ->
        GroupQueryAttention(..., past_key, past_value, ..., k_scale, v_scale)
            {k_quant_type: PER_CHANNEL, v_quant_type: PER_CHANNEL, kv_cache_bit_width: 8}

    Graph inputs and outputs of the cache become int8 `[batch, kv heads, positions, head size]`, with 4 bits uint8
    `[batch, kv heads, positions, head size / 2]`, under the names that they have. Scales are float32 `[1, kv heads, 1,
    head size]`. It needs ONNX Runtime 1.27.

    Requires QUANTIZED, ensures QUANTIZED.

    Attributes:
        caches: layer -> how its cache is quantized; each layer must be there. Other layers are left alone.
    """

    name: ClassVar[str] = "store-kv-cache-as-integers"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    caches: Mapping[int, StaticKVQuantization] = field(repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change the layers.

        Raises:
            ValueError: a layer without attention, an attention that has scales already, bits that the operator does
                not have, or scales that are not positive float32 of the shape of a position of the cache.
        """
        found = attention_layers(model, self.caches)
        for layer, cache in self.caches.items():
            _quantize(model, found[layer], cache)
        return ir.passes.PassResult(model, modified=bool(self.caches))


def _quantize(model: ir.Model, node: ir.Node, cache: StaticKVQuantization) -> None:
    if cache.bits not in _TYPES:
        raise ValueError(f"node {node.name}: a cache of {cache.bits} bits, {GQA} has {sorted(_TYPES)}")
    if any(value is not None for value in node.inputs[_KEY_SCALE:]):
        raise ValueError(f"node {node.name}: {GQA} has scales already")
    heads, size = _head_shape(node, cache.bits)
    node.resize_inputs(_INPUTS)
    for index, kind, scales in ((_KEY_SCALE, "key", cache.key_scales), (_VALUE_SCALE, "value", cache.value_scales)):
        _check_scales(node, kind, scales, (heads, size))
        value = initializer(model, f"{node.name}/{kind}_scales", scales.reshape(1, heads, 1, size))
        node.replace_input_with(index, value)
    node.attributes["k_quant_type"] = ir.AttrString("k_quant_type", "PER_CHANNEL")
    node.attributes["v_quant_type"] = ir.AttrString("v_quant_type", "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", cache.bits)
    data_type, packed = _TYPES[cache.bits]
    for cached in (required_input(node, PAST_KEY), required_input(node, PAST_VALUE), *node.outputs[1:3]):
        shape = cached.shape
        assert shape is not None, "caches are graph inputs and outputs, whose shapes are declared"
        cached.type, cached.shape = ir.TensorType(data_type), ir.Shape([*shape[:3], size // packed])


def _head_shape(node: ir.Node, bits: int) -> tuple[int, int]:
    """KV heads and head size."""
    shape = required_input(node, PAST_KEY).shape
    heads, size = (None, None) if shape is None or len(shape) != 4 else (shape[1], shape[3])
    if not isinstance(heads, int) or not isinstance(size, int) or (bits == 4 and size % 2):
        raise ValueError(
            f"node {node.name}: {heads} KV heads of {size} channels, expected numbers, even ones at 4 bits"
        )
    return heads, size


def _check_scales(node: ir.Node, kind: str, scales: npt.NDArray[Any], shape: tuple[int, int]) -> None:
    fine = scales.dtype == np.float32 and scales.shape == shape and np.isfinite(scales).all() and (scales > 0).all()
    if not fine:
        raise ValueError(
            f"node {node.name}: {kind} scales are {scales.dtype} {list(scales.shape)}, expected positive float32 "
            f"{list(shape)}"
        )
