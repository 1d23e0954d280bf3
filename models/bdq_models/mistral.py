"""Mistral 7B and its kin: Llama's block with a sliding window on all layers or none."""

from __future__ import annotations

from bdq_models.architecture import Architecture
from bdq_models.blocks import EDGES, LINEARS, RESIDUAL_READERS, RESIDUAL_WRITERS

MISTRAL = Architecture(
    name="mistral",
    classes=("MistralForCausalLM",),
    linears=LINEARS,
    edges=EDGES,
    residual_readers=RESIDUAL_READERS,
    residual_writers=RESIDUAL_WRITERS,
    defaults=(("num_key_value_heads", 8), ("sliding_window", 4096)),
)
