"""A transformers model that computes as the exported file will: online transforms, quantized activations and cache.

Weights are the caller's: put the values of quantized ones in place with `float_model.replace_weights`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Module

from bdq_export.fake_quant.activations import fake_quantize_tokens
from bdq_export.fake_quant.hadamard import apply_online
from bdq_export.float_model import locate_linear
from bdq_models import Architecture, Dimensions
from bdq_runtime.specs import ActivationQuantization, AnyKVQuantization, OnlineTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class FakeQuantization:
    """How a model computes; the mappings may change while a model computes with them.

    Attributes:
        activations: canonical path of a linear -> how its inputs are quantized; float where there is none.
        online: canonical path of a linear -> what is applied to its inputs first.
        kv: layer -> how its cache is quantized.
    """

    activations: Mapping[str, ActivationQuantization] = field(default_factory=dict)
    online: Mapping[str, OnlineTransform] = field(default_factory=dict)
    kv: Mapping[int, AnyKVQuantization] = field(default_factory=dict)


@contextmanager
def fake_quantized(
    model: PreTrainedModel, architecture: Architecture, dimensions: Dimensions, quantization: FakeQuantization
) -> Iterator[None]:
    """Let `model` compute with `quantization` while the context is open; see `attach`."""
    detach = attach(model, architecture, dimensions, quantization)
    try:
        yield
    finally:
        detach()


def attach(
    model: PreTrainedModel, architecture: Architecture, dimensions: Dimensions, quantization: FakeQuantization
) -> Callable[[], None]:
    """Let `model` compute with `quantization` until the returned function is called.

    Linears that share an input in one module (packed ones) must share what is done to it: the first path counts.
    Hooks that others put on the inputs of these modules afterwards see what the product sees.
    """
    from bdq_export.fake_quant.attention import quantized_attention

    paths = [
        architecture.layer_path(layer, path) for layer in range(dimensions.layers) for path in architecture.linears
    ]
    first: dict[str, str] = {}
    for path in (*paths, architecture.lm_head):
        first.setdefault(locate_linear(architecture, dimensions, path).module, path)
    with ExitStack() as stack:
        shared = _Shared()
        for name, path in first.items():
            hook = _input_hook(path, quantization, shared)
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        stack.enter_context(quantized_attention(model, architecture.layers, quantization.kv))
        return stack.pop_all().close


class _Shared:
    """The last input and its result: q, k and v (gate and up) get the same tensor in turn."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._result: Tensor | None = None

    def get(self, key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
        same = len(key) == len(self._key) and all(a is b for a, b in zip(key, self._key, strict=True))
        if not same or self._result is None:
            self._key, self._result = key, make()
        return self._result


def _input_hook(
    path: str, quantization: FakeQuantization, shared: _Shared
) -> Callable[[Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(_module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        online, activation = quantization.online.get(path), quantization.activations.get(path)
        if online is None and activation is None:
            return None
        x: Tensor = inputs[0]
        return (shared.get((x, online, activation), lambda: transform_input(x, online, activation)), *inputs[1:])

    return hook


def transform_input(x: Tensor, online: OnlineTransform | None, activation: ActivationQuantization | None) -> Tensor:
    """What the product of a linear sees of its input `[..., K]`, float32."""
    x = x.float()
    if online is not None:
        x = apply_online(x, online)
    return x if activation is None else fake_quantize_tokens(x, activation.bits, activation.clip)
