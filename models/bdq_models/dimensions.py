"""The sizes of one model, read from config.json with the defaults that transformers assumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bdq_models.architecture import Architecture, Edge
from bdq_models.families import get_architecture


@dataclass(frozen=True)
class Dimensions:
    """Sizes of a decoder.

    Attributes:
        tied: lm_head shares the embedding's weight.
        rotary_dim: leading channels of a head that RoPE rotates; channel i pairs with i + rotary_dim/2.
        sliding_window: window of the layers that have one; None when all layers attend to everything.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tied: bool
    rotary_dim: int
    context_length: int
    sliding_window: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Dimensions:
        """Read the sizes from a parsed config.json.

        Raises:
            LookupError: the family is not supported.
            ValueError: a size is missing, no positive integer, or does not divide as it must.
        """
        architecture = get_architecture(config)
        values = {**dict(architecture.defaults), **config}
        heads = _size(values, "num_attention_heads")
        hidden_size = _size(values, "hidden_size")
        head_dim = _size(values, "head_dim", default=hidden_size // heads)
        kv_heads = _size(values, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise ValueError(f"config.json: {heads} attention heads are no multiple of {kv_heads} key/value heads")
        return cls(
            hidden_size=hidden_size,
            layers=_size(values, "num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=_size(values, "intermediate_size"),
            vocab_size=_size(values, "vocab_size"),
            tied=bool(values.get("tie_word_embeddings", False)),
            rotary_dim=_rotary_dim(architecture, values, head_dim),
            context_length=_size(values, "max_position_embeddings"),
            sliding_window=_sliding_window(values),
        )

    @property
    def group(self) -> int:
        """Query heads for each key/value head."""
        return self.heads // self.kv_heads

    def output_size(self, path: str) -> int:
        """Rows of the linear `path`, or the length of the norm `path` (relative to a decoder layer).

        Raises:
            LookupError: the path ends in no known role.
        """
        return self._sizes_by_role(path)[0]

    def input_size(self, path: str) -> int:
        """Columns of the linear `path` (relative to a decoder layer).

        Raises:
            LookupError: the path ends in no known role.
        """
        return self._sizes_by_role(path)[1]

    def free_channels(self, edge: Edge) -> int:
        """Length of a diagonal of `edge`: the outputs of its producers (before any repetition over heads)."""
        return self.output_size(edge.producers[0])

    def _sizes_by_role(self, path: str) -> tuple[int, int]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        hidden, middle = self.hidden_size, self.intermediate_size
        role = path.rsplit(".", 1)[-1]
        sizes = {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (middle, hidden),
            "up_proj": (middle, hidden),
            "down_proj": (hidden, middle),
            "q_norm": (self.head_dim, self.head_dim),
            "k_norm": (self.head_dim, self.head_dim),
        }
        if role in sizes:
            return sizes[role]
        if role.endswith("layernorm"):
            return hidden, hidden
        raise LookupError(f"{path!r} is no known module of a decoder layer; known roles: {sorted(sizes)}")


def split_rows(architecture: Architecture, dimensions: Dimensions, packed: str) -> tuple[tuple[str, int, int], ...]:
    """The logical parts of the packed linear `packed`, each as (path, first row, row after the last).

    Args:
        packed: path relative to a decoder layer, a key of `architecture.packed`.

    Raises:
        LookupError: the family has no such packed linear.
    """
    parts = dict(architecture.packed).get(packed)
    if parts is None:
        raise LookupError(f"{architecture.name} has no packed linear {packed!r}; it has {dict(architecture.packed)}")
    rows = []
    start = 0
    for part in parts:
        end = start + dimensions.output_size(part)
        rows.append((part, start, end))
        start = end
    return tuple(rows)


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key} is {value!r}, expected a positive integer")
    return value


def _rotary_dim(architecture: Architecture, values: Mapping[str, Any], head_dim: int) -> int:
    factor: Any = 1.0
    if architecture.partial_rotary:
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
        raise ValueError(f"config.json: partial_rotary_factor is {factor!r}, expected a number in (0, 1]")
    rotary_dim = int(head_dim * factor)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ValueError(f"config.json: {rotary_dim} rotary channels in a head of {head_dim}, expected an even number")
    return rotary_dim


def _sliding_window(values: Mapping[str, Any]) -> int | None:
    if values.get("use_sliding_window") is False or values.get("sliding_window") is None:
        return None
    return _size(values, "sliding_window")
