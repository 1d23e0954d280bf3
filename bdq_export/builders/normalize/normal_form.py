"""The normal form that both builders end in, whatever they started from.

    linear      MatMul named after its module on `<path>.weight` [K, N], metadata `bdq.parts`; bias Add after it
    q, k, v     one linear `<layer>.self_attn.qkv_proj` where attention reads them unchanged
    embedding   Gather on `model.embed_tokens.weight` [V, hidden]
    lm_head     the linear `lm_head`; tied: a view of the embedding, metadata `bdq.tied`
    norm        RMSNormalization or SkipSimplifiedLayerNormalization, gain `<path>.weight`
    attention   GroupQueryAttention with RoPE, `<layer>.self_attn`
    inputs      input_ids, attention_mask, past_key_values.N.{key,value}; outputs logits, present.N.{key,value}

No node reads metadata of the builder, a Constant, or a transposed or concatenated initializer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from bdq_export.builders.graph import initializer, remove_dead, set_name
from bdq_export.builders.normalize.frame import attach_frame
from bdq_export.builders.normalize.linears import fold_linears, pack_attention_inputs
from bdq_export.builders.normalize.names import declare_interface, lift_constants, name_everything
from bdq_export.builders.normalize.norms import fuse_residual_additions, name_norms
from bdq_export.builders.rope import Rope
from bdq_export.builders.weights import WeightSource
from bdq_export.errors import BdqError
from bdq_models import Dimensions

OPSET, IR_VERSION = 23, 11


def normalize(
    model: ir.Model,
    source: WeightSource,
    dimensions: Dimensions,
    ropes: Mapping[str, Rope],
    layer_types: Sequence[str],
) -> ir.Model:
    """Bring `model` to the normal form, in place.

    Args:
        model: parameters `[N, K]` named as in the checkpoint, GroupQueryAttention on named cache inputs.
        source: where every weight comes from.
        dimensions: sizes of the model.
        ropes: RoPE by layer type ("" for all).
        layer_types: type of each layer.

    Raises:
        InvalidInputError: a weight is missing, or the graph has no place for it.
    """
    attach_frame(model, ropes, layer_types, dimensions.context_length, source.architecture.layers)
    remove_dead(model)
    lift_constants(model)
    fold_linears(model, source)
    pack_attention_inputs(model, source)
    name_norms(model, source)
    fuse_residual_additions(model)
    _name_embedding(model, source)
    remove_dead(model)
    declare_interface(model, dimensions)
    name_everything(model)
    _require_values(model)
    source.require_all_taken()
    model.functions.clear()
    model.ir_version = IR_VERSION
    model.graph.opset_imports.clear()
    model.graph.opset_imports.update({"": OPSET, "com.microsoft": 1})
    return model


def _name_embedding(model: ir.Model, source: WeightSource) -> None:
    """Point each Gather on the token table at the embedding's array, whatever a tied model called the parameter."""
    embedding = source.architecture.embedding
    names = (f"{embedding}.weight", f"{source.architecture.lm_head}.weight")
    for node in list(model.graph):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if table is None or table.name not in names:
            continue
        model.graph.initializers.pop(names[0], None)
        node.replace_input_with(0, initializer(model, ir.Tensor(source.array(names[0]), name=names[0])))
        set_name(node, embedding)


def _require_values(model: ir.Model) -> None:
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            raise BdqError(f"the builder left the parameter {name} without a value; please report this model")
