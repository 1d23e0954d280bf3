"""Llama 2 and 3 (rope scaling included), SmolLM2, and everything else saved as `LlamaForCausalLM`."""

from __future__ import annotations

from bdq_models.architecture import Architecture
from bdq_models.blocks import ATTENTION_BIASES, EDGES, LINEARS, MLP_BIASES, RESIDUAL_READERS, RESIDUAL_WRITERS

LLAMA = Architecture(
    name="llama",
    classes=("LlamaForCausalLM",),
    linears=LINEARS,
    edges=EDGES,
    residual_readers=RESIDUAL_READERS,
    residual_writers=RESIDUAL_WRITERS,
    biases=(ATTENTION_BIASES, MLP_BIASES),
)
