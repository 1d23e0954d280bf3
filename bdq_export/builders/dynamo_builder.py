"""Float graphs by tracing transformers' own code: for every family, and the only way for some.

Tracing costs time for each layer, and layers of one type differ in nothing but their weights. So a model with one layer
of each type is traced, and its layers are repeated (`replicate`) as often as the model has them.
"""

from __future__ import annotations

import ast
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from bdq_export.builders.graph import remove_dead, set_scope
from bdq_export.builders.normalize.names import lift_constants
from bdq_export.builders.replicate import repeat_layers
from bdq_export.builders.simplify import simplify
from bdq_export.errors import UnsupportedModelError
from bdq_models import Architecture, Dimensions

if TYPE_CHECKING:
    from torch import Tensor

    from bdq_export.float_model import ModelDescription

_PREFIX = "model."
"""What `TracedDecoder` puts before every module path."""


@dataclass(frozen=True)
class _Template:
    """A model with one layer of each type."""

    config: dict[str, Any]
    architecture: Architecture


def trace(checkpoint: ModelDescription, weights: Mapping[str, Tensor], layer_types: Sequence[str]) -> ir.Model:
    """The decoder with parameters that have names and shapes; their values are the caller's business.

    Args:
        checkpoint: gives the config and the family.
        weights: canonical float32 weights; only those of the traced layers are looked at.
        layer_types: attention type of each layer.

    Raises:
        UnsupportedModelError: torch cannot trace the model's code, or its layers cannot be repeated.
    """
    from bdq_export.builders.tracing import TracedDecoder, replaced
    from bdq_export.float_model import load_float_model

    architecture = checkpoint.architecture
    kinds = list(dict.fromkeys(layer_types))
    template = _Template(_template_config(checkpoint.config, kinds), architecture)
    subset = _template_weights(architecture, weights, [layer_types.index(kind) for kind in kinds])
    sizes = replace(Dimensions.from_config(checkpoint.config), layers=len(kinds))
    decoder = TracedDecoder(load_float_model(template, subset), sizes)
    with replaced(decoder, architecture, len(kinds)), _silence():
        model = _export(decoder, len(kinds))
    _record_scopes(model)
    _drop_parameter_values(model, weights)
    lift_constants(model)
    simplify(model)
    remove_dead(model)
    repeat_layers(model, architecture.layers, [kinds.index(kind) for kind in layer_types])
    _declare_mask(model)
    return model


def _template_config(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    values = {**config, "num_hidden_layers": len(kinds)}
    if len(kinds) > 1 or "layer_types" in config:
        values["layer_types"] = list(kinds)
    return values


def _template_weights(
    architecture: Architecture, weights: Mapping[str, Tensor], layers: Sequence[int]
) -> dict[str, Tensor]:
    """Weights outside of the layers, and those of `layers` under the indices 0, 1, ..."""
    inside = f"{architecture.layers}."
    subset = {name: weights[name] for name in weights if not name.startswith(inside)}
    for index, layer in enumerate(layers):
        prefix = f"{inside}{layer}."
        subset |= {
            f"{inside}{index}.{name.removeprefix(prefix)}": weights[name] for name in weights if name.startswith(prefix)
        }
    return subset


def _export(decoder: Any, layers: int) -> ir.Model:
    import torch

    leaves = [f"{layer}.{leaf}" for layer in range(layers) for leaf in ("key", "value")]
    fixed = ["input_ids", "sequence_lengths", "total_length", "cos", "sin"]
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                decoder,
                decoder.example(),
                dynamo=True,
                optimize=False,  # it would fold transposed copies of the weights
                verbose=False,
                opset_version=23,
                input_names=[*fixed, *(f"past_key_values.{leaf}" for leaf in leaves)],
                output_names=["logits", *(f"present.{leaf}" for leaf in leaves)],
                dynamic_shapes=decoder.dynamic_shapes(),
            )
    except RuntimeError as error:
        cause = " ".join(str(error.__cause__ or error).split())[:200]
        raise UnsupportedModelError(f"torch cannot trace this model: {type(error).__name__}: {cause}") from error
    assert program is not None, "dynamo export returns a program"
    return program.model


@contextmanager
def _silence() -> Iterator[None]:
    """torch warns of names and shapes that are as they should be."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _record_scopes(model: ir.Model) -> None:
    """Keep the module path of each node; torch's list of scopes ends in the path and then the name of the fx node."""
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        set_scope(node, scopes[-2].removeprefix(_PREFIX) if len(scopes) > 1 else "")


def _drop_parameter_values(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Name parameters as in the checkpoint and forget their values; what is no weight is a constant and stays."""
    for old, value in list(model.graph.initializers.items()):
        name = old.removeprefix(_PREFIX)
        if name != old:
            value.name = name
        if name.endswith((".weight", ".bias")):
            value.const_value = None


def _declare_mask(model: ir.Model) -> None:
    """Put `attention_mask` in the place of the inputs that the frame computes from it."""
    mask = ir.Value(name="attention_mask", type=ir.TensorType(ir.DataType.INT64))
    model.graph.inputs.insert(1, mask)
