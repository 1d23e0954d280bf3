"""The float model in torch: transformers' own code over tensors that somebody else holds.

Parameters are made on the meta device and then *assigned*, so the weights exist once however large the model
is. Buffers that no checkpoint holds (RoPE frequencies, Gemma's embedding scale) are computed as usual.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bdq_export.errors import InvalidInputError
from bdq_export.lazy_weights import LazyWeights, layer_of
from bdq_export.streamed_blocks import stream, streamed
from bdq_models import Architecture, Dimensions, split_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class ModelDescription(Protocol):
    """What of a checkpoint the float model needs."""

    @property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""

    @property
    def architecture(self) -> Architecture:
        """The family."""


@dataclass(frozen=True)
class LinearSlice:
    """Where a logical linear lives in the torch model: rows `start:stop` of the weight of `module`."""

    module: str
    start: int
    stop: int


def load_float_model(checkpoint: ModelDescription, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The causal LM of `checkpoint` over `weights`, in eval mode with sdpa attention and no gradients.

    Args:
        checkpoint: gives the config and the family; its own weights are not read.
        weights: canonical weights (see `Checkpoint.weights`), float32; shared, not copied, except the parts of
            packed linears. With `lm_head.weight` the model is untied whatever the config says. Of `LazyWeights`, the
            model holds one block at a time (see `streamed_blocks`).

    Raises:
        InvalidInputError: transformers refuses the config, or a weight is missing, unknown or of a wrong shape.
    """
    import accelerate
    from transformers import AutoModelForCausalLM

    config = transformers_config(checkpoint, untied=f"{checkpoint.architecture.lm_head}.weight" in weights)
    with accelerate.init_empty_weights(include_buffers=False):
        from_config: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
        model = from_config(config, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False)
    inside = f"{checkpoint.architecture.layers}."
    if isinstance(weights, LazyWeights):
        stream(model, checkpoint.architecture, Dimensions.from_config(checkpoint.config), weights.scratch)
    replace_weights(model, checkpoint.architecture, weights)
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_meta and not (isinstance(weights, LazyWeights) and name.startswith(inside))
    ]
    if missing:
        raise InvalidInputError(
            f"{len(missing)} weights are missing, the first is {missing[0]}; the checkpoint is incomplete"
        )
    model.train(False)
    return model


def replace_weights(model: PreTrainedModel, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
    """Make `model` use `weights`, sharing the tensors; names that are not given stay as they are.

    Args:
        model: a model of `load_float_model`.
        architecture: its family.
        weights: canonical names; parts of packed linears are re-packed (a copy). A given `lm_head.weight` unties
            the model; otherwise a tied lm_head follows the embedding.

    Raises:
        InvalidInputError: an unknown name or a wrong shape.
    """
    blocks = streamed(model)
    if blocks is not None:
        blocks.replace(weights)
        weights = {name: weights[name] for name in weights if layer_of(architecture, name) is None}
    head = f"{architecture.lm_head}.weight"
    tied = bool(model.config.tie_word_embeddings) and head not in weights
    named = _pack(model, architecture, weights)
    try:
        result = model.load_state_dict(named, strict=False, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise InvalidInputError(f"weights do not fit config.json: {detail}") from error
    if result.unexpected_keys:
        raise InvalidInputError(
            f"weight {result.unexpected_keys[0]} does not belong to a {architecture.name} model of this config; "
            f"{len(result.unexpected_keys)} such weights"
        )
    model.config.tie_word_embeddings = tied
    if tied:
        embedding = model.get_submodule(architecture.embedding)
        model.get_submodule(architecture.lm_head).weight = embedding.weight
    model.requires_grad_(False)


def locate_linear(architecture: Architecture, dimensions: Dimensions, path: str) -> LinearSlice:
    """The module of the torch model, and its rows, that compute the logical linear `path`.

    Args:
        path: absolute and canonical, such as `model.layers.0.self_attn.q_proj` or `lm_head`.

    Raises:
        LookupError: `path` is no linear of the family.
    """
    if path == architecture.lm_head:
        return LinearSlice(path, 0, dimensions.vocab_size)
    match = re.fullmatch(rf"({re.escape(architecture.layers)}\.\d+)\.(.+)", path)
    if match is None or match[2] not in architecture.linears:
        raise LookupError(f"{path!r} is no linear of {architecture.name}; expected {architecture.linears}")
    prefix, role = match.groups()
    packed = architecture.packed_into(role)
    if packed is None:
        return LinearSlice(path, 0, dimensions.output_size(role))
    rows = {part: (start, stop) for part, start, stop in split_rows(architecture, dimensions, packed)}
    return LinearSlice(f"{prefix}.{packed}", *rows[role])


def transformers_config(checkpoint: ModelDescription, untied: bool) -> PretrainedConfig:
    """The transformers config of a model, with what the weights say about tying.

    Raises:
        InvalidInputError: transformers refuses config.json.
    """
    from transformers import AutoConfig

    values = {key: value for key, value in checkpoint.config.items() if key not in ("model_type", "auto_map")}
    if untied:
        values["tie_word_embeddings"] = False
    try:
        return AutoConfig.for_model(checkpoint.architecture.name, **values)
    except Exception as error:  # transformers raises a family of unrelated types for a bad config
        detail = " ".join(str(error).split())
        raise InvalidInputError(f"config.json is not valid for {checkpoint.architecture.name}: {detail}") from error


def _pack(model: PreTrainedModel, architecture: Architecture, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under the names of the torch model; parts that are not given keep the module's rows."""
    if not architecture.packed:
        return dict(weights)
    dimensions = Dimensions.from_config(model.config.to_dict())
    named = dict(weights)
    for packed, parts in architecture.packed:
        rows = split_rows(architecture, dimensions, packed)
        for layer in range(dimensions.layers):
            for leaf in ("weight", "bias"):
                names = [f"{architecture.layer_path(layer, part)}.{leaf}" for part in parts]
                if not any(name in named for name in names):
                    continue
                target = f"{architecture.layer_path(layer, packed)}.{leaf}"
                present = model.get_parameter(target)
                named[target] = torch.cat(
                    [named.pop(name, present[start:stop]) for name, (_, start, stop) in zip(names, rows, strict=True)]
                )
    return named
