"""Attention over a quantized KV cache inside a transformers model: an attention function registered by name.

It is called after RoPE, q/k norms and the cache, with all keys and values so far. Rows are quantized one by one, or
channels by scales that no row changes, so quantizing them again in every step gives what a quantized cache holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bdq_export.fake_quant.hadamard import online_hadamard
from bdq_export.fake_quant.kv_channels import channel_steps, fake_quantize_channels
from bdq_export.fake_quant.kv_rows import fake_quantize_rows
from bdq_runtime.specs import AnyKVQuantization, StaticKVQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "bdq_fake_quant"

HeadTransform = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""`(layer, query, key, value) -> (query, key, value)`, each `[batch, heads, tokens, head_dim]` float32."""

_TRANSFORMS: WeakKeyDictionary[Module, tuple[int, HeadTransform]] = WeakKeyDictionary()
"""What each attention module does to its inputs now; modules that are not here attend as usual."""


def quantize_heads(query: Tensor, key: Tensor, value: Tensor, spec: AnyKVQuantization) -> tuple[Tensor, Tensor, Tensor]:
    """Query, and keys and values as they come back from the cache; all `[..., heads, tokens, head_dim]` float32."""
    if isinstance(spec, StaticKVQuantization):
        key = fake_quantize_channels(key, channel_steps(spec.key_scales), spec.bits)
        return query, key, fake_quantize_channels(value, channel_steps(spec.value_scales), spec.bits)
    if spec.hadamard:
        query = online_hadamard(query, query.shape[-1])
        key = online_hadamard(key, key.shape[-1])
    key = fake_quantize_rows(key, spec.key_bits, spec.key_clip)
    return query, key, fake_quantize_rows(value, spec.value_bits, spec.value_clip)


@contextmanager
def attention_inputs(model: PreTrainedModel, layers: str, transform: HeadTransform) -> Iterator[None]:
    """Let the attention of every decoder layer of `model` see what `transform` makes of its inputs.

    Args:
        model: of `load_float_model`.
        layers: path of its list of decoder blocks.
        transform: called with the index of the layer; replaces an outer context's for as long as this one is open.
    """
    modules = [_attention_of(block) for block in model.get_submodule(layers).children()]
    before = model.config._attn_implementation
    replaced = {module: _TRANSFORMS.get(module) for module in modules}
    try:
        for layer, module in enumerate(modules):
            _TRANSFORMS[module] = (layer, transform)
        model.config._attn_implementation = NAME
        yield
    finally:
        model.config._attn_implementation = before
        for module, outer in replaced.items():
            if outer is None:
                _TRANSFORMS.pop(module, None)
            else:
                _TRANSFORMS[module] = outer


@contextmanager
def quantized_attention(model: PreTrainedModel, layers: str, specs: Mapping[int, AnyKVQuantization]) -> Iterator[None]:
    """Let the attention of decoder layer i read a cache quantized by `specs[i]`, looked up at each call.

    Layers without a spec attend to what they are given.
    """

    def transform(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = specs.get(layer)
        return (query, key, value) if spec is None else quantize_heads(query, key, value, spec)

    with attention_inputs(model, layers, transform):
        yield


def _attention_of(block: Module) -> Module:
    """The attention module of a decoder block: the one that transformers numbers."""
    found = [module for module in block.modules() if hasattr(module, "layer_idx") and hasattr(module, "head_dim")]
    if len(found) != 1:
        raise RuntimeError(f"{len(found)} attention modules in a decoder block, expected 1")
    return found[0]


def _attend(
    module: Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    found = _TRANSFORMS.get(module)
    if found is not None:
        layer, transform = found
        dtype = query.dtype
        changed = transform(layer, query.float(), key.float(), value.float())
        query, key, value = (states.to(dtype) for states in changed)
    if kwargs.get("softcap") is not None:
        return _soft_capped(module, query, key, value, attention_mask, **kwargs), None
    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return result


def _soft_capped(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float = 0.0,
    **_: Any,
) -> Tensor:
    """`softmax(c tanh(scale q kᵀ / c)) v`, which sdpa does not have; `[batch, tokens, heads, head_dim]`."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = softcap * torch.tanh(query.float() @ key.float().transpose(-1, -2) * scale / softcap)
    tokens, seen = scores.shape[-2:]
    if attention_mask is None:
        attention_mask = torch.ones(tokens, seen, dtype=torch.bool).tril(seen - tokens)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
