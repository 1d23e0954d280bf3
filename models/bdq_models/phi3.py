"""Phi-3 and Phi-4: Llama's block with packed qkv and gate/up weights and a rotary part of each head."""

from __future__ import annotations

from bdq_models.architecture import Architecture
from bdq_models.blocks import EDGES, GATE_UP, LINEARS, QKV, RESIDUAL_READERS, RESIDUAL_WRITERS

PHI3 = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    linears=LINEARS,
    edges=EDGES,
    residual_readers=RESIDUAL_READERS,
    residual_writers=RESIDUAL_WRITERS,
    packed=(("self_attn.qkv_proj", QKV), ("mlp.gate_up_proj", GATE_UP)),
    partial_rotary=True,
)
