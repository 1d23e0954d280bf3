"""Tensors of a checked checkpoint in torch: mapped from the files, canonical names, float32, finite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdq_export.errors import InvalidInputError
from bdq_export.lazy_weights import LazyWeights, layer_of
from bdq_export.scratch import Scratch
from bdq_models import Architecture, Dimensions, split_rows

if TYPE_CHECKING:
    from bdq_export.checkpoint.directory import Checkpoint


def read_tensor(path: Path, name: str) -> Tensor:
    """The tensor `name` of the safetensors file `path`, mapped, not copied."""
    return _read(path, (name,))[name]


def load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """See `Checkpoint.weights`."""
    stored = {name: _finite_float32(name, tensor) for name, tensor in _stored(checkpoint).items()}
    _drop_tied(checkpoint, stored)
    return _split_packed(checkpoint.architecture, checkpoint.dimensions, stored)


class MappedWeights(LazyWeights):
    """See `Checkpoint.lazy_weights`."""

    def __init__(self, checkpoint: Checkpoint, scratch: Scratch) -> None:
        stored = _stored(checkpoint)
        for name, tensor in stored.items():
            _finite_float32(name, tensor)
        _drop_tied(checkpoint, stored)
        self._scratch, self._architecture = scratch, checkpoint.architecture
        self.packed = dict(stored)
        """Tensors under the names of the torch model, as they are stored (mapped)."""
        self._parts = _split_packed(checkpoint.architecture, checkpoint.dimensions, stored)
        self._ends: dict[str, Tensor] = {}

    @property
    def scratch(self) -> Scratch:
        """As it was given."""
        return self._scratch

    @property
    def names(self) -> Collection[str]:
        """Canonical names."""
        return self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return tuple(self._parts[name].shape)

    def __getitem__(self, name: str) -> Tensor:
        """The weight `name` in float32."""
        if layer_of(self._architecture, name) is not None:
            return _float32(self._parts[name])
        if name not in self._ends:
            self._ends[name] = _float32(self._parts[name])
        return self._ends[name]


def _stored(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What of the files belongs to the model, as stored, mapped."""
    architecture = checkpoint.architecture
    return {
        name: tensor
        for path, entries in checkpoint.files.items()
        for name, tensor in _read(path, tuple(entries)).items()
        if name.startswith((architecture.embedding, architecture.final_norm, architecture.lm_head))
        or (name.startswith(f"{architecture.layers}.") and "rotary_emb" not in name)
    }


def _drop_tied(checkpoint: Checkpoint, stored: dict[str, Tensor]) -> None:
    """Take out an lm_head that is the embedding; `stored` is finite."""
    architecture = checkpoint.architecture
    lm_head, embedding = f"{architecture.lm_head}.weight", f"{architecture.embedding}.weight"
    if not checkpoint.dimensions.tied or lm_head not in stored:
        return
    if not torch.equal(_float32(stored.pop(lm_head)), _float32(stored[embedding])):
        raise InvalidInputError(
            f"config.json ties lm_head to the embedding (tie_word_embeddings) but {lm_head} holds other values; "
            "set tie_word_embeddings to false, or remove the tensor"
        )


def to_checkpoint_names(architecture: Architecture, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of the canonical naming: parts of packed linears are concatenated again (a copy), the rest is shared.

    Args:
        architecture: the family.
        weights: canonical name -> tensor; a packed linear with all of its parts or none.
    """
    result = dict(weights)
    layers = sorted({int(name.split(".")[position]) for name, position in _layer_names(architecture, weights)})
    for packed, parts in architecture.packed:
        for layer in layers:
            prefix = f"{architecture.layers}.{layer}"
            for kind in ("weight", "bias"):
                names = [f"{prefix}.{part}.{kind}" for part in parts]
                if all(name in result for name in names):
                    result[f"{prefix}.{packed}.{kind}"] = torch.cat([result.pop(name) for name in names])
    return result


def _layer_names(architecture: Architecture, weights: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    position = architecture.layers.count(".") + 1
    return [(name, position) for name in weights if name.startswith(f"{architecture.layers}.")]


def _split_packed(architecture: Architecture, dimensions: Dimensions, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each packed linear by views of its parts."""
    for packed, _ in architecture.packed:
        rows = split_rows(architecture, dimensions, packed)
        for layer in range(dimensions.layers):
            prefix = f"{architecture.layers}.{layer}"
            for kind in ("weight", "bias"):
                tensor = stored.pop(f"{prefix}.{packed}.{kind}", None)
                if tensor is not None:
                    stored.update({f"{prefix}.{part}.{kind}": tensor[start:stop] for part, start, stop in rows})
    return stored


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InvalidInputError(f"{path.name} cannot be read: {reason}; download it again") from None


def _float32(tensor: Tensor) -> Tensor:
    # A parameter that is made inside of a forward must be fit for a gradient that somebody takes later.
    with torch.inference_mode(False):
        return tensor.to(torch.float32)


def _finite_float32(name: str, tensor: Tensor) -> Tensor:
    """`tensor` as float32 (shared if it is already).

    Raises:
        InvalidInputError: it holds NaN or infinity.
    """
    values = tensor.to(torch.float32)
    # One fast pass decides almost always: a NaN or infinity cannot vanish from a sum. A sum of finite values may
    # overflow, so only the exact count below may refuse.
    if not bool(torch.isfinite(values.sum())):
        count = int((~torch.isfinite(values)).sum())
        if count:
            raise InvalidInputError(
                f"tensor {name} has {count} of {values.numel()} values that are NaN or infinite; "
                "the checkpoint is damaged or diverged in training"
            )
    return values
