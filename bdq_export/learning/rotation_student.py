"""A float model whose activations and cache are rounded in a rotated frame: gradients reach the rotations.

Nothing is folded. What a site's product reads is rotated, rounded and rotated back, and the weights are those of the
untransformed model: `Q(x R) Rᵀ Wᵀ` is what a folded model computes, `Q(x R) (W R)ᵀ`, and costs two small products a
site instead of a new set of weights a step. Norms give `Q(x R1) R1ᵀ γ`: the gain belongs to the weights there, as it
does once R1 is folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bdq_export.fake_quant.attention import HeadTransform, attention_inputs
from bdq_export.float_model import locate_linear
from bdq_export.learning.rotations import Rotations
from bdq_export.learning.straight_through import rotate, rotate_back, rotate_online, row_values, token_values
from bdq_export.transform import Transforms
from bdq_models import Architecture, Dimensions
from bdq_runtime.specs import ActivationQuantization, KVQuantization, OnlineTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class RotationStudent:
    """How the model computes.

    Args:
        architecture: its family, whose norms commute with a residual rotation.
        dimensions: its sizes.
        transforms: with the online rotations in front of down_proj and their signs; its R1 and R2 are not read.
        rotations: R1 and R2.
        activation: quantization of the inputs of the blocks' linears; None leaves them float.
        head: quantization of the inputs of lm_head; None leaves them float.
        cache: quantization of the cache; None leaves it float.
    """

    def __init__(
        self,
        architecture: Architecture,
        dimensions: Dimensions,
        transforms: Transforms,
        rotations: Rotations,
        activation: ActivationQuantization | None,
        head: ActivationQuantization | None,
        cache: KVQuantization | None,
    ) -> None:
        self.architecture, self.dimensions = architecture, dimensions
        self.transforms, self.rotations = transforms, rotations
        self.activation, self.head, self.cache = activation, head, cache

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Let `model` compute so while the context is open.

        Args:
            model: computes with the untransformed float weights.
        """
        architecture = self.architecture
        with ExitStack() as stack:
            for layer in range(self.dimensions.layers):
                for norm, _ in architecture.residual_readers:
                    self._at_norm(model, architecture.layer_path(layer, norm), self.activation, stack)
                for edge in architecture.edges:
                    transform = self._input_transform(layer, edge.name)
                    if transform is not None:
                        path = architecture.layer_path(layer, edge.consumers[0])
                        module = model.get_submodule(locate_linear(architecture, self.dimensions, path).module)
                        stack.callback(module.register_forward_pre_hook(_on_input(transform)).remove)
            self._at_norm(model, architecture.final_norm, self.head, stack)
            stack.enter_context(attention_inputs(model, architecture.layers, self._heads()))
            yield

    def _at_norm(
        self, model: PreTrainedModel, path: str, activation: ActivationQuantization | None, stack: ExitStack
    ) -> None:
        module = model.get_submodule(path)
        weight, offset = module.get_parameter("weight"), self.architecture.norm_offset
        gain = weight.detach() + offset
        module.weight = Parameter(torch.full_like(weight, 1 - offset), requires_grad=False)
        stack.callback(setattr, module, "weight", weight)
        residual = self.rotations.residual

        def hook(_module: Module, _inputs: Any, output: Tensor) -> Tensor:
            return (_rounded(output @ residual, activation) @ residual.T) * gain

        stack.callback(module.register_forward_hook(hook).remove)

    def _input_transform(self, layer: int, edge: str) -> Callable[[Tensor], Tensor] | None:
        """What the input of the linears behind `edge` goes through; None where a norm or nothing does it."""
        online = self.transforms.online.get((layer, edge))
        if edge == "value":
            return self._attended(self.rotations.heads[layer], online)
        if online is None:
            return None
        return self._online(online, self.transforms.diagonals_before[layer, edge].float())

    def _attended(self, rotation: Tensor, online: OnlineTransform | None) -> Callable[[Tensor], Tensor]:
        size = self.dimensions.head_dim

        def transform(x: Tensor) -> Tensor:  # values were rotated before they were cached
            if online is None:
                rounded = _rounded(x, self.activation)
            else:
                rounded = rotate_back(_rounded(rotate_online(x.float(), online), self.activation), online)
            back: Tensor = rounded.reshape(*x.shape[:-1], -1, size) @ rotation.T
            return back.reshape(x.shape)

        return transform

    def _online(self, online: OnlineTransform, before: Tensor) -> Callable[[Tensor], Tensor]:
        def transform(x: Tensor) -> Tensor:
            rotated = rotate_online(x.float() * before, online)
            return rotate_back(_rounded(rotated, self.activation), online) / before

        return transform

    def _heads(self) -> HeadTransform:
        cache = self.cache

        def transform(layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value = (value @ self.rotations.heads[layer]).float()
            if cache is None:
                return query, key, value
            if cache.hadamard:
                query, key = rotate(query, query.shape[-1]), rotate(key, key.shape[-1])
            key = row_values(key, torch.tensor(cache.key_clip), cache.key_bits)
            return query, key, row_values(value, torch.tensor(cache.value_clip), cache.value_bits)

        return transform


def _rounded(x: Tensor, activation: ActivationQuantization | None) -> Tensor:
    if activation is None:
        return x.float()
    return token_values(x.float(), activation.bits, activation.clip)


def _on_input(transform: Callable[[Tensor], Tensor]) -> Callable[[Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (transform(inputs[0]), *inputs[1:])

    return hook
