"""How llama.cpp's converter stored a family in a GGUF file, so that it can be undone."""

from __future__ import annotations

from dataclasses import dataclass

from bdq_models.architecture import Architecture
from bdq_models.gemma3 import GEMMA3
from bdq_models.llama import LLAMA

ConstantValue = str | int | float | bool


@dataclass(frozen=True)
class GgufFamily:
    """One value of `general.architecture`.

    Attributes:
        architecture: the family it becomes.
        names: module name within a block of the GGUF -> path relative to a decoder layer.
        permuted: GGUF names of linears whose rows are interleaved by RoPE pair within each head.
        norm_offset: was added to the stored norm weights.
        constants: config.json entries that the file does not carry.
        copies: config.json key -> key whose value it repeats.
        sliding_pattern: every n-th layer attends to everything, the others within the window; 0 without window.
    """

    architecture: Architecture
    names: tuple[tuple[str, str], ...]
    permuted: tuple[str, ...] = ()
    norm_offset: float = 0.0
    constants: tuple[tuple[str, ConstantValue], ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    sliding_pattern: int = 0


_COMMON = (
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
)

GGUF_FAMILIES = {
    "llama": GgufFamily(
        architecture=LLAMA,
        names=(*_COMMON, ("ffn_norm", "post_attention_layernorm")),
        permuted=("attn_q", "attn_k"),
        constants=(("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)),
    ),
    "gemma3": GgufFamily(
        architecture=GEMMA3,
        names=(
            *_COMMON,
            ("attn_q_norm", "self_attn.q_norm"),
            ("attn_k_norm", "self_attn.k_norm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ),
        norm_offset=1.0,
        constants=(
            ("hidden_activation", "gelu_pytorch_tanh"),
            ("attention_bias", False),
            ("rope_local_base_freq", 10000.0),
        ),
        copies=(("query_pre_attn_scalar", "head_dim"),),
        sliding_pattern=6,
    ),
}
