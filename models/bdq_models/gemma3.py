"""Gemma 3 text models: offset norms, q/k norms, and norms *after* o_proj and down_proj.

    h = h + post_attention_layernorm(o_proj(...))        x = input_layernorm(h)
    h = h + post_feedforward_layernorm(down_proj(...))   y = pre_feedforward_layernorm(h)

The gain of a post-norm does not commute with a rotation of the residual stream: no residual rotation here.
"""

from __future__ import annotations

from bdq_models.architecture import Architecture, Builder, Edge
from bdq_models.blocks import (
    ATTENTION_BIASES,
    ATTENTION_IN,
    GATE_UP,
    HEAD_NORMS,
    KEY_QUERY_NORMS,
    LINEARS,
    MLP_MIDDLE,
    QKV,
    RESIDUAL_WRITERS,
    VALUE,
)

GEMMA3 = Architecture(
    name="gemma3_text",
    classes=("Gemma3ForCausalLM",),
    linears=LINEARS,
    edges=(
        ATTENTION_IN,
        VALUE,
        KEY_QUERY_NORMS,
        Edge("mlp_in", ("pre_feedforward_layernorm",), GATE_UP),
        MLP_MIDDLE,
    ),
    residual_readers=(("input_layernorm", QKV), ("pre_feedforward_layernorm", GATE_UP)),
    residual_writers=RESIDUAL_WRITERS,
    biases=(ATTENTION_BIASES,),
    residual_rotation=False,
    norm_offset=1.0,
    builder=Builder.DYNAMO,
    norms=(
        "input_layernorm",
        *HEAD_NORMS,
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    defaults=(
        ("head_dim", 256),
        ("num_key_value_heads", 4),
        ("sliding_window", 4096),
        ("tie_word_embeddings", True),
    ),
)
