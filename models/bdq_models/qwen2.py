"""Qwen2 and Qwen2.5: Llama's block with biases on q, k and v."""

from __future__ import annotations

from bdq_models.architecture import Architecture
from bdq_models.blocks import EDGES, LINEARS, QKV, RESIDUAL_READERS, RESIDUAL_WRITERS

QWEN2 = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    linears=LINEARS,
    edges=EDGES,
    residual_readers=RESIDUAL_READERS,
    residual_writers=RESIDUAL_WRITERS,
    biases=(("", QKV),),
    defaults=(("num_key_value_heads", 32), ("sliding_window", 4096), ("use_sliding_window", False)),
)
