"""The tensors that a config says a checkpoint holds, and the comparison with what it does hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdq_export.errors import InvalidInputError
from bdq_models import Architecture, Dimensions, split_rows

_RECOMPUTED = (".rotary_emb.inv_freq",)
"""Buffers that old checkpoints saved; transformers computes them, so they are ignored."""


def expected_shapes(
    architecture: Architecture, dimensions: Dimensions, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the checkpoint, packed linears as stored.

    A tied model has no entry for lm_head.
    """
    hidden = dimensions.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        f"{architecture.embedding}.weight": (dimensions.vocab_size, hidden),
        f"{architecture.final_norm}.weight": (hidden,),
    }
    if not dimensions.tied:
        shapes[f"{architecture.lm_head}.weight"] = (dimensions.vocab_size, hidden)
    layer = _layer_shapes(architecture, dimensions, config)
    for index in range(dimensions.layers):
        shapes.update({f"{architecture.layers}.{index}.{name}": shape for name, shape in layer.items()})
    return shapes


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], lm_head: str) -> None:
    """Compare the tensors of a checkpoint with what its config says.

    Args:
        expected: of `expected_shapes`.
        found: name -> shape of the tensors in the files.
        lm_head: module path of the lm_head; a tied model may store it (its values are compared when loading).

    Raises:
        InvalidInputError: a tensor is missing, has another shape, or is not part of the model.
    """
    missing = sorted(set(expected) - set(found))
    if missing:
        raise InvalidInputError(
            f"{len(missing)} tensors that config.json calls for are missing, the first is {missing[0]}; "
            "the checkpoint is incomplete or its config.json is of another model"
        )
    wanted = dict(expected)
    embedding = next(iter(expected.values()))
    wanted.setdefault(f"{lm_head}.weight", embedding)
    for name, shape in found.items():
        if name.endswith(_RECOMPUTED):
            continue
        if name not in wanted:
            raise InvalidInputError(
                f"tensor {name[:80]!r} of shape {list(shape)} is not part of the model that config.json describes"
            )
        if shape != wanted[name]:
            raise InvalidInputError(
                f"tensor {name} has shape {list(shape)}; config.json calls for {list(wanted[name])}"
            )


def _layer_shapes(
    architecture: Architecture, dimensions: Dimensions, config: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Name relative to a decoder layer -> shape."""
    values = {**dict(architecture.defaults), **config}
    biased = {path for key, paths in architecture.biases if not key or values.get(key) for path in paths}
    rows = {path: dimensions.output_size(path) for path in architecture.linears}
    columns = {path: dimensions.input_size(path) for path in architecture.linears}
    for packed, parts in architecture.packed:
        rows[packed] = split_rows(architecture, dimensions, packed)[-1][2]
        columns[packed] = columns[parts[0]]
        for part in parts:
            del rows[part], columns[part]
    shapes: dict[str, tuple[int, ...]] = {f"{path}.weight": (rows[path], columns[path]) for path in rows}
    shapes.update({f"{path}.bias": (rows[path],) for path in rows if path in biased})
    shapes.update({f"{path}.weight": (dimensions.output_size(path),) for path in architecture.norms})
    return shapes
