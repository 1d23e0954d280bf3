"""Transformers' own code traced by torch, with three things replaced by one operator each.

    attention       GroupQueryAttention on the cache, RoPE inside        (attention interface)
    RoPE            nothing: the operator rotates                        (`apply_rotary_pos_emb` of the model's module)
    RMS norms       RMSNormalization on the stored weight                (`forward` of the modules the family names)

The replacements are in force only inside `replaced`; they compute nothing, torch records them as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from bdq_export.errors import UnsupportedModelError
from bdq_models import Architecture, Dimensions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "bdq_group_query_attention"
_ROPE = "apply_rotary_pos_emb"
_BATCH, _SEQUENCE = 2, 3
"""Example sizes: different, so that torch does not take one for the other; not 1, which it would take for fixed."""

Cache = list[tuple[Tensor, Tensor]]


class TracedDecoder(nn.Module):
    """A causal LM whose cache comes in and goes out as tensors."""

    def __init__(self, model: PreTrainedModel, dimensions: Dimensions) -> None:
        """Wrap `model`; its layers are those of `dimensions`."""
        super().__init__()
        self.model = model
        self._dimensions = dimensions
        self._inputs: tuple[Tensor, ...] = ()
        self._past: Cache = []
        self._present: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(
        self, input_ids: Tensor, lengths: Tensor, total: Tensor, cos: Tensor, sin: Tensor, past: Cache
    ) -> tuple[Tensor, Cache]:
        """Logits `[batch, sequence, vocabulary]` and the cache with the new tokens."""
        self._inputs, self._past = (lengths, total, cos, sin), past
        result = self.model(
            input_ids=input_ids, attention_mask=None, position_ids=torch.zeros_like(input_ids), use_cache=False
        )
        return result.logits, [self._present[layer] for layer in range(self._dimensions.layers)]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """The attention function of transformers' interface; query, key, value are `[batch, heads, sequence, dim]`."""
        layer = cast(int, module.layer_idx)
        batch, heads, sequence, size = query.shape
        past_key, past_value = self._past[layer]
        attributes: dict[str, Any] = {
            "num_heads": heads,
            "kv_num_heads": key.shape[1],
            "scale": float(scaling if scaling is not None else size**-0.5),
            "do_rotary": 1,
            "rotary_interleaved": 0,
        }
        if sliding_window:
            attributes["local_window_size"] = int(sliding_window)
        if softcap:
            attributes["softcap"] = float(softcap)
        flat = [tensor.transpose(1, 2).reshape(batch, sequence, -1) for tensor in (query, key, value)]
        output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (*flat, past_key, past_value, *self._inputs),
            attributes,
            dtypes=(query.dtype,) * 3,
            shapes=((batch, sequence, heads * size), past_key.shape, past_value.shape),
            version=1,
        )
        self._present[layer] = (present_key, present_value)
        return output.reshape(batch, sequence, heads, size), None

    def example(self) -> tuple[Any, ...]:
        """Arguments of `forward` to trace with.

        Everything but the tokens goes from an input to the attention operator and from there to an output; no shape
        is computed from it. So stand-ins of fixed shape do, which spares torch a good part of its symbolic shapes.
        """
        tokens = torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64)
        shared = [torch.zeros(1, dtype=torch.int32) for _ in range(2)] + [torch.zeros(1) for _ in range(2)]
        return tokens, *shared, [(torch.zeros(1), torch.zeros(1)) for _ in range(self._dimensions.layers)]

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """The dimensions of `example` that vary."""
        return {0: "batch", 1: "sequence"}, None, None, None, None, [({}, {})] * self._dimensions.layers


@contextmanager
def replaced(decoder: TracedDecoder, architecture: Architecture, layers: int) -> Iterator[None]:
    """Replace attention, RoPE and norms of `decoder` while it is traced.

    Raises:
        UnsupportedModelError: the model's code applies RoPE in a way that cannot be replaced.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    model = decoder.model
    code = sys.modules[type(model).__module__]
    rope = getattr(code, _ROPE, None)
    if rope is None:
        raise UnsupportedModelError(f"{code.__name__} has no {_ROPE}: this version of transformers cannot be traced")
    AttentionInterface.register(ATTENTION, decoder.attend)
    AttentionMaskInterface.register(ATTENTION, lambda *_, **__: None)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    norms = [model.get_submodule(path) for path in _norm_paths(architecture, layers)]
    for norm in norms:
        norm.forward = MethodType(_traced_norm, norm)
    setattr(code, _ROPE, lambda query, key, *_, **__: (query, key))
    try:
        yield
    finally:
        setattr(code, _ROPE, rope)
        for norm in norms:
            del norm.forward
        model.set_attn_implementation(before)


def _norm_paths(architecture: Architecture, layers: int) -> list[str]:
    inner = [architecture.layer_path(layer, path) for layer in range(layers) for path in architecture.norms]
    return [*inner, architecture.final_norm]


def _traced_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    result: Tensor = torch.onnx.ops.symbolic(
        "RMSNormalization",
        (hidden, cast(Tensor, norm.weight)),
        {"axis": -1, "epsilon": float(cast(float, epsilon))},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=23,
    )
    return result
