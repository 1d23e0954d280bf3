"""What the project knows of a model family: module paths by role, and where a scale or a rotation cancels.

A family is one `Architecture` constant. Paths are relative to a decoder layer and use the names of the
Hugging Face checkpoint; a packed weight (Phi-3's `qkv_proj`) is addressed by its logical parts
(`self_attn.q_proj`, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Tie(Enum):
    """Channels of an edge that must share one factor, so that producer and consumer stay inverse."""

    NONE = "none"
    REPEAT_KV_HEADS = "repeat_kv_heads"
    """One factor per KV-head channel; the consumer repeats it over the query heads of the group."""
    ROPE_PAIRS = "rope_pairs"
    """As REPEAT_KV_HEADS, and channels i and i + rotary_dim/2 of a head share one factor: RoPE mixes them."""


class Side(Enum):
    """Which axis of a weight `[N, K]` an edge scales."""

    INPUT = "input"
    """Columns."""
    OUTPUT = "output"
    """Rows, and the bias."""


@dataclass(frozen=True)
class Edge:
    """Scale the outputs of `producers` by D and `consumers` by D⁻¹: the function of the model is unchanged.

    A producer is a norm (its gain is scaled) or a linear (rows and bias). A consumer is a linear, scaled on
    `consumer_side`, or a norm (q_norm, k_norm) when that side is OUTPUT.
    """

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    consumer_side: Side = Side.INPUT
    tie: Tie = Tie.NONE


class Builder(Enum):
    """Which builder makes the float graph of a family."""

    MOBIUS = "mobius"
    DYNAMO = "dynamo"


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Attributes:
        name: `model_type` in config.json.
        classes: accepted `architectures[0]` values.
        layers: path prefix of the decoder layers in the checkpoint; layer i is `<layers>.<i>`.
        linears: paths of the linears of a decoder layer in execution order, logical parts for packed ones.
        edges: where diagonals cancel.
        residual_readers: for each norm that reads the residual stream, the linears it feeds.
        residual_writers: linears whose output is added to the residual stream.
        residual_rotation: False where the norms do not commute with a rotation of the residual stream.
        packed: checkpoint path of a packed linear -> its logical parts, in row order.
        norm_offset: added to a norm's stored weight to get its gain (Gemma: 1).
        builder: the builder that is right for this family.
        norms: paths of the norms of a decoder layer.
        partial_rotary: True where `partial_rotary_factor` is honoured (elsewhere transformers ignores it).
        defaults: values of config.json keys that transformers assumes when the file leaves them out.
        biases: a boolean config.json key, "" for always -> the linears that have a bias when it is true.
    """

    name: str
    classes: tuple[str, ...]
    linears: tuple[str, ...]
    edges: tuple[Edge, ...]
    residual_readers: tuple[tuple[str, tuple[str, ...]], ...]
    residual_writers: tuple[str, ...]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    residual_rotation: bool = True
    packed: tuple[tuple[str, tuple[str, ...]], ...] = ()
    norm_offset: float = 0.0
    builder: Builder = Builder.MOBIUS
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    partial_rotary: bool = False
    defaults: tuple[tuple[str, int | bool], ...] = ()
    biases: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def edge(self, name: str) -> Edge:
        """The edge called `name`.

        Raises:
            LookupError: the family has no such edge.
        """
        for edge in self.edges:
            if edge.name == name:
                return edge
        raise LookupError(f"{self.name} has no edge {name!r}; it has {[edge.name for edge in self.edges]}")

    def is_norm(self, path: str) -> bool:
        """Whether `path` (relative to a decoder layer) is a norm: it has a gain, not rows and columns."""
        return path in self.norms

    def layer_path(self, layer: int, path: str) -> str:
        """The checkpoint's module path of `path` in decoder layer `layer`."""
        return f"{self.layers}.{layer}.{path}"

    def packed_into(self, path: str) -> str | None:
        """The packed module that holds the logical linear `path`; None where it is stored by itself."""
        for packed, parts in self.packed:
            if path in parts:
                return packed
        return None
