"""One finished piece of work as bytes: a safetensors file whose header holds the plain values as JSON. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

_KEY = "values"


@dataclass(frozen=True, eq=False)
class Record:
    """What a piece of work came to.

    Attributes:
        values: anything that JSON holds; floats come back to the last bit.
        tensors: by name, of any dtype and shape, bit by bit.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def part(self, prefix: str) -> Record:
        """The record that was merged under `prefix`.

        Raises:
            KeyError: there is none.
        """
        start = f"{prefix}/"
        tensors = {name.removeprefix(start): value for name, value in self.tensors.items() if name.startswith(start)}
        return Record(self.values[prefix], tensors)

    def to_bytes(self) -> bytes:
        """The content of the file."""
        # Copies: safetensors refuses tensors that share memory, as those of linears of one site may.
        tensors = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in self.tensors.items()
        }
        return save(tensors, {_KEY: json.dumps(self.values)})


def merged(parts: Mapping[str, Record]) -> Record:
    """One record of several; see `Record.part`."""
    values = {prefix: dict(record.values) for prefix, record in parts.items()}
    tensors = {f"{prefix}/{name}": value for prefix, record in parts.items() for name, value in record.tensors.items()}
    return Record(values, tensors)


def from_bytes(data: bytes) -> Record:
    """The record that `to_bytes` wrote.

    Raises:
        ValueError: `data` is no such file.
    """
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        values = json.loads(header["__metadata__"][_KEY])
    except (SafetensorError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no record: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"no record: its values are a {type(values).__name__}, expected an object")
    return Record(values, tensors)
