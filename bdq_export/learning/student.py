"""A transformers model whose quantizers have gradients: codes of weights are fixed, scales around them are learned.

Products of integer codes are exact in bfloat16 (fewer than 256 levels on both sides), so a product reads the codes of a
weight in two bytes, and no gradient of it is needed: what is learned lies on its rows and on its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bdq_export.calibration.precision import product_dtype
from bdq_export.fake_quant.activations import fake_quantize_tokens
from bdq_export.fake_quant.attention import HeadTransform, attention_inputs
from bdq_export.fake_quant.kv_channels import channel_steps
from bdq_export.learning.parameters import Parameters, all_sites, modules_of
from bdq_export.learning.scaled_product import ScaledWeight, scaled_product
from bdq_export.learning.state import QuantizedModel
from bdq_export.learning.straight_through import channel_values, rotate, rotate_online, row_values, token_codes
from bdq_export.learning.weight_sources import WeightSource, WeightSources
from bdq_export.streamed_blocks import streamed
from bdq_export.transform.kronecker import apply_kronecker
from bdq_models import Architecture, Dimensions
from bdq_runtime.specs import ActivationQuantization, StaticKVQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def learning(
    model: PreTrainedModel,
    architecture: Architecture,
    dimensions: Dimensions,
    state: QuantizedModel,
    parameters: Parameters,
) -> Iterator[None]:
    """Let `model` compute as `state` with `parameters` while the context is open, and as before afterwards.

    Args:
        model: of `state`; has its embedding, norms, biases and (dequantized) lm_head, weights of linears are not read.
            Where its blocks are streamed, what products read is made of codes in each forward and not kept.
        architecture: its family.
        dimensions: its sizes.
        state: the quantized model.
        parameters: of `initial_parameters` for `state`.
    """
    last = _LastInput()
    blocks = streamed(model)
    weights = WeightSources(state, parameters, product_dtype(), None if blocks is None else blocks.scratch)
    with ExitStack() as stack:
        for site in all_sites(architecture, dimensions):
            source = _SiteInput(site.paths[0], state, parameters, last)
            for name, places in modules_of(architecture, dimensions, site).items():
                module = model.get_submodule(name)
                parts = [weights(f"{path}.weight") for path, _ in places]
                module.forward = _Linear(module._parameters.get("bias"), parts, source)
                stack.callback(delattr, module, "forward")
        for name, gain in parameters.gains.items():
            stack.callback(model.get_submodule(name).register_forward_hook(_scaled_output(gain)).remove)
        head = state.activations.get(architecture.lm_head)
        if head is not None:
            hook = model.get_submodule(architecture.final_norm).register_forward_hook(_rounded_output(head))
            stack.callback(hook.remove)
        stack.enter_context(attention_inputs(model, architecture.layers, _cache(state, parameters)))
        yield


@dataclass(frozen=True, eq=False)
class _Operand:
    """What a product reads: values `[..., K]`, and their steps `[..., 1]` where they are integers."""

    values: Tensor
    steps: Tensor | None


class _LastInput:
    """The last site's operand: q, k and v (gate and up) get the same tensor in turn."""

    def __init__(self) -> None:
        self._key: tuple[Tensor, object, bool] | None = None
        self._operand: _Operand | None = None

    def get(self, x: Tensor, site: object, make: Callable[[Tensor], _Operand]) -> _Operand:
        # What was made without gradients is no good with them.
        grad = torch.is_grad_enabled()
        key = self._key
        if key is None or self._operand is None or key[0] is not x or key[1] is not site or key[2] != grad:
            self._key, self._operand = (x, site, grad), make(x.float())
        return self._operand


class _SiteInput:
    """Transforms and quantizes the input of the linears of a site."""

    def __init__(self, first: str, state: QuantizedModel, parameters: Parameters, last: _LastInput) -> None:
        self._online = state.online.get(first)
        self._activation = state.activations.get(first)
        self._log_factors = parameters.diagonals.get(first)
        self._clip = parameters.clips.get(first)
        self._shared = last
        self._dtype = product_dtype()

    def __call__(self, x: Tensor) -> _Operand:
        return self._shared.get(x, self, self._make)

    def _make(self, x: Tensor) -> _Operand:
        if self._online is not None and self._online.kronecker is not None:
            x = apply_kronecker(x, self._online.kronecker)
        elif self._online is not None:
            x = rotate_online(x, self._online)
            if self._online.diagonal is not None and self._log_factors is not None:
                x = x * (torch.from_numpy(self._online.diagonal) * self._log_factors.exp())
        if self._activation is None or self._clip is None:
            return _Operand(x.to(self._dtype), None)
        return _Operand(*token_codes(x, self._clip, self._activation.bits, self._dtype))


class _Linear:
    """The forward of a linear module: codes times codes, then steps, scales and learned factors."""

    def __init__(self, bias: Tensor | None, parts: list[WeightSource], source: _SiteInput) -> None:
        self._bias, self._parts, self._source = bias, parts, source

    def __call__(self, x: Tensor) -> Tensor:
        operand = self._source(x)
        outputs = [_product(operand, part()) for part in self._parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if self._bias is None else y + self._bias


def _product(operand: _Operand, weight: ScaledWeight) -> Tensor:
    return scaled_product(operand.values, operand.steps, weight.log_factors, weight)


def _scaled_output(log_factors: Parameter) -> Callable[[Module, Any, Tensor], Tensor]:
    def hook(_module: Module, _inputs: Any, output: Tensor) -> Tensor:
        return output * log_factors.exp()

    return hook


def _rounded_output(activation: ActivationQuantization) -> Callable[[Module, Any, Tensor], Tensor]:
    """The inputs of lm_head: rounded, with the gradient of what is not."""

    def hook(_module: Module, _inputs: Any, output: Tensor) -> Tensor:
        rounded = fake_quantize_tokens(output.detach(), activation.bits, activation.clip)
        return output + (rounded - output).detach()

    return hook


def _cache(state: QuantizedModel, parameters: Parameters) -> HeadTransform:
    def transform(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spec = state.kv.get(layer)
        if spec is None:
            return query, key, value
        if isinstance(spec, StaticKVQuantization):
            key = channel_values(key, channel_steps(spec.key_scales), spec.bits)
            return query, key, channel_values(value, channel_steps(spec.value_scales), spec.bits)
        if spec.hadamard:
            query, key = rotate(query, query.shape[-1]), rotate(key, key.shape[-1])
        key = row_values(key, parameters.key_clips[layer], spec.key_bits)
        return query, key, row_values(value, parameters.value_clips[layer], spec.value_bits)

    return transform
