"""Float ONNX graphs of a checkpoint, in one normal form whichever builder made them (`normalize.normal_form`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bdq_export.builders.check import check_float_graph
from bdq_export.errors import UnsupportedModelError
from bdq_models import Builder, Dimensions

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from bdq_export.float_model import ModelDescription


def build_float_graph(
    checkpoint: ModelDescription, weights: Mapping[str, Tensor], builder: Builder | None = None
) -> ir.Model:
    """The float decoder with a KV cache as an ONNX graph over `weights`.

    The graph is not verified here: `check_float_graph` compares it with torch.

    Args:
        checkpoint: gives the config and the family; its own weights are not read.
        weights: canonical float32 weights. Matrices become `[K, N]` views of them, not copies; packed ones, and all of
            `LazyWeights`, are made when somebody reads them. With `lm_head.weight` the graph is untied whatever
            the config says.
        builder: instead of the one that the family's row names. Without it, what that one cannot make (mobius knows
            no biases in an MLP, for one) is traced.

    Raises:
        UnsupportedModelError: the builder cannot make this config, or its RoPE depends on the prompt's length.
        InvalidInputError: a weight is missing, or the graph has no place for it.
        MissingDependencyError: the builder's package is not installed.
    """
    from bdq_export.builders.layer_kinds import layer_types
    from bdq_export.builders.normalize import normalize
    from bdq_export.builders.rope import rope_of_layers
    from bdq_export.builders.weights import UnusedWeightError, WeightSource
    from bdq_export.float_model import transformers_config

    config = transformers_config(checkpoint, untied=f"{checkpoint.architecture.lm_head}.weight" in weights)
    dimensions = Dimensions.from_config(checkpoint.config)
    ropes = rope_of_layers(config, dimensions.rotary_dim)
    kinds = layer_types(config)

    def build(chosen: Builder) -> ir.Model:
        source = WeightSource(checkpoint.architecture, weights)
        model = _raw_graph(chosen, checkpoint, weights, kinds, source.tied)
        return normalize(model, source, dimensions, ropes, kinds)

    first = builder or checkpoint.architecture.builder
    try:
        return build(first)
    except (UnsupportedModelError, UnusedWeightError):
        if builder is not None or first is Builder.DYNAMO:
            raise
        return build(Builder.DYNAMO)


def _raw_graph(
    builder: Builder, checkpoint: ModelDescription, weights: Mapping[str, Tensor], kinds: Sequence[str], tied: bool
) -> ir.Model:
    if builder is Builder.MOBIUS:
        from bdq_export.builders.mobius_builder import construct

        return construct(checkpoint.config, checkpoint.architecture, tied)
    from bdq_export.builders.dynamo_builder import trace

    return trace(checkpoint, weights, kinds)


__all__ = ["Builder", "build_float_graph", "check_float_graph"]
