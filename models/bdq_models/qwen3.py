"""Qwen3 (dense): Llama's block with a norm on each head of q and k before RoPE."""

from __future__ import annotations

from bdq_models.architecture import Architecture
from bdq_models.blocks import (
    ATTENTION_BIASES,
    ATTENTION_IN,
    HEAD_NORMS,
    KEY_QUERY_NORMS,
    LINEARS,
    MLP_IN,
    MLP_MIDDLE,
    RESIDUAL_READERS,
    RESIDUAL_WRITERS,
    VALUE,
)

QWEN3 = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    linears=LINEARS,
    edges=(ATTENTION_IN, VALUE, KEY_QUERY_NORMS, MLP_IN, MLP_MIDDLE),
    residual_readers=RESIDUAL_READERS,
    residual_writers=RESIDUAL_WRITERS,
    biases=(ATTENTION_BIASES,),
    norms=("input_layernorm", *HEAD_NORMS, "post_attention_layernorm"),
    defaults=(
        ("head_dim", 128),
        ("num_key_value_heads", 32),
        ("sliding_window", 4096),
        ("use_sliding_window", False),
    ),
)
