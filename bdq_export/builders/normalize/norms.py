"""Norms: gains by name, and the residual addition fused into the norm that reads it.

The fusion:

    h = Add(residual, x); y = RMSNormalization(h, g)   ->   y, h = SkipSimplifiedLayerNormalization(residual, x, g)
"""

from __future__ import annotations

import onnx_ir as ir

from bdq_export.builders.graph import initializer, producer_of, replace_value, set_name
from bdq_export.builders.normalize.linears import is_bias_add
from bdq_export.builders.weights import WeightSource

_GAIN_INPUT = {"RMSNormalization": 1, "SkipSimplifiedLayerNormalization": 2}
_SUM_OUTPUT = 3


def name_norms(model: ir.Model, source: WeightSource) -> None:
    """Name each norm after its module and give it its gain (stored weight plus the family's offset)."""
    for node in model.graph:
        index = _GAIN_INPUT.get(node.op_type)
        gain = None if index is None else node.inputs[index]
        if index is None or gain is None or not gain.is_initializer():
            continue
        name = str(gain.name)
        set_name(node, name.removesuffix(".weight"))
        if gain.const_value is None or name in source:
            model.graph.initializers.pop(name)
            node.replace_input_with(index, initializer(model, source.gain(name)))


def fuse_residual_additions(model: ir.Model) -> None:
    """Fuse each addition of two activations into the first norm over the last axis that reads the sum.

    An addition of a bias is left alone: the fused operator adds tensors of one shape.
    """
    for norm in list(model.graph):
        if norm.op_type != "RMSNormalization" or not _last_axis(norm):
            continue
        add = producer_of(norm.inputs[0], "Add")
        if add is None or is_bias_add(add.outputs[0]) or any(_is_constant(value) for value in add.inputs):
            continue
        fused = ir.node(
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
            domain="com.microsoft",
            num_outputs=_SUM_OUTPUT + 1,
        )
        set_name(fused, str(norm.name))
        model.graph.insert_after(add, fused)
        replace_value(norm.outputs[0], fused.outputs[0])
        replace_value(add.outputs[0], fused.outputs[_SUM_OUTPUT])
        model.graph.remove([norm, add], safe=True)


def _last_axis(norm: ir.Node) -> bool:
    return norm.attributes.get_int("axis", -1) == -1


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()
