"""RoPE tables as a small subgraph: the cos/sin caches that GroupQueryAttention reads, computed when a session loads.

    positions = Range(0, context_length)          [context, 1]
    angles    = positions · inv_freq              [context, rotary/2]
    cos, sin  = Cos(angles)·s, Sin(angles)·s      s: attention scaling, left out where it is 1

ONNX Runtime folds it once per session, so a file holds rotary/2 numbers and not 2·context·rotary/2 of them
(128 MB for a context of 131,072). float32 throughout, in the order of transformers' own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_export.builders.graph import constant, insert_first
from bdq_export.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ROTARY_STEP = 16
STATIC_TYPES = ("default", "linear", "llama3", "proportional", "yarn")
"""Kinds of RoPE whose frequencies do not depend on the length of the prompt."""


@dataclass(frozen=True)
class Rope:
    """Frequencies of one kind of layer.

    Attributes:
        inverse_frequencies: float32 `[rotary_dim / 2]`.
        scaling: factor on cos and sin (YaRN); 1 elsewhere.
    """

    inverse_frequencies: npt.NDArray[np.float32]
    scaling: float


def rope_of_layers(config: PretrainedConfig, rotary_dim: int) -> dict[str, Rope]:
    """The RoPE of each kind of layer; the key is the layer type, "" where all layers share one.

    Args:
        config: the transformers config.
        rotary_dim: channels of a head that are rotated.

    Raises:
        UnsupportedModelError: a kind of RoPE that depends on the length of the prompt, or a rotated part of a head
            that GroupQueryAttention cannot do.
    """
    if rotary_dim % _ROTARY_STEP:
        raise UnsupportedModelError(
            f"{rotary_dim} channels of each head are rotated, GroupQueryAttention needs a multiple of {_ROTARY_STEP}"
        )
    parameters: Mapping[str, Any] = config.rope_parameters
    if "rope_theta" in parameters or "rope_type" in parameters:
        return {"": _rope(config, parameters, None, rotary_dim)}
    return {kind: _rope(config, values, kind, rotary_dim) for kind, values in parameters.items() if values}


def _rope(config: PretrainedConfig, values: Mapping[str, Any], kind: str | None, rotary_dim: int) -> Rope:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope_type = values.get("rope_type", "default")
    if rope_type not in STATIC_TYPES:
        raise UnsupportedModelError(
            f"config.json: rope_type {rope_type!r} depends on the length of the prompt, which a fixed table cannot; "
            f"supported: {', '.join(STATIC_TYPES)}"
        )
    if rope_type == "default":
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
        return Rope((1.0 / (values["rope_theta"] ** exponents)).numpy(), 1.0)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), layer_type=kind)
    return Rope(frequencies.float().numpy(), float(scaling))


def add_rope_tables(model: ir.Model, rope: Rope, context_length: int, prefix: str) -> tuple[ir.Value, ir.Value]:
    """Put the subgraph at the start of the graph.

    Args:
        model: gains the nodes and the initializer `<prefix>.inv_freq`.
        rope: the frequencies.
        context_length: rows of the tables.
        prefix: of the names of everything that is added.

    Returns:
        The cos and sin caches, float32 `[context_length, rotary_dim / 2]`.
    """
    frequencies = constant(model, f"{prefix}.inv_freq", rope.inverse_frequencies[None, :])
    bounds = [
        constant(model, f"{prefix}.{name}", np.array(value, np.float32))
        for name, value in (("first_position", 0), ("context_length", context_length), ("step", 1))
    ]
    last_axis = constant(model, f"{prefix}.last_axis", np.array([1], np.int64))
    positions = ir.node("Range", bounds, name=f"{prefix}.positions")
    column = ir.node("Unsqueeze", [positions.outputs[0], last_axis], name=f"{prefix}.column")
    angles = ir.node("Mul", [column.outputs[0], frequencies], name=f"{prefix}.angles")
    nodes = [positions, column, angles]
    tables = []
    for name, op_type in (("cos", "Cos"), ("sin", "Sin")):
        nodes.append(ir.node(op_type, [angles.outputs[0]], name=f"{prefix}.{name}"))
        if rope.scaling != 1.0:
            scaling = constant(model, f"{prefix}.scaling", np.array(rope.scaling, np.float32))
            nodes.append(ir.node("Mul", [nodes[-1].outputs[0], scaling], name=f"{prefix}.{name}_scaled"))
        tables.append(nodes[-1].outputs[0])
    insert_first(model, nodes)
    return tables[0], tables[1]
