"""The parts that families share: the names and edges of a pre-norm block with a gated MLP.

    h = h + o_proj(attention(q_proj(x), k_proj(x), v_proj(x)))     x = input_layernorm(h)
    h = h + down_proj(act(gate_proj(y)) * up_proj(y))              y = post_attention_layernorm(h)

`down_proj` is linear in `up_proj`, and attention is linear in `v_proj`: a diagonal cancels across both pairs.
`q · k` is bilinear: a diagonal cancels between the two, wherever RoPE commutes with it (`Tie.ROPE_PAIRS`).
"""

from __future__ import annotations

from bdq_models.architecture import Edge, Side, Tie

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
LINEARS = (*QKV, "self_attn.o_proj", *GATE_UP, "mlp.down_proj")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

ATTENTION_BIASES = ("attention_bias", (*QKV, "self_attn.o_proj"))
MLP_BIASES = ("mlp_bias", (*GATE_UP, "mlp.down_proj"))

RESIDUAL_READERS = (("input_layernorm", QKV), ("post_attention_layernorm", GATE_UP))
RESIDUAL_WRITERS = ("self_attn.o_proj", "mlp.down_proj")

ATTENTION_IN = Edge("attention_in", ("input_layernorm",), QKV)
VALUE = Edge("value", ("self_attn.v_proj",), ("self_attn.o_proj",), tie=Tie.REPEAT_KV_HEADS)
KEY_QUERY = Edge("key_query", ("self_attn.k_proj",), ("self_attn.q_proj",), Side.OUTPUT, Tie.ROPE_PAIRS)
MLP_IN = Edge("mlp_in", ("post_attention_layernorm",), GATE_UP)
MLP_MIDDLE = Edge("mlp_middle", ("mlp.up_proj",), ("mlp.down_proj",))
EDGES = (ATTENTION_IN, VALUE, KEY_QUERY, MLP_IN, MLP_MIDDLE)

KEY_QUERY_NORMS = Edge("key_query", ("self_attn.k_norm",), ("self_attn.q_norm",), Side.OUTPUT, Tie.ROPE_PAIRS)
"""With q/k norms a scale of k_proj would be normalised away; it lives in the gains, shared by all heads."""
