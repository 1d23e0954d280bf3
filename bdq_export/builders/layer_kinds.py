"""What differs between the decoder layers of one model: their attention type and window."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: PretrainedConfig) -> tuple[str, ...]:
    """The attention type of each layer, in transformers' words."""
    listed = getattr(config, "layer_types", None)
    if listed:
        return tuple(listed)
    kind = SLIDING if getattr(config, "sliding_window", None) else FULL
    return (kind,) * int(config.num_hidden_layers)


def windows(config: PretrainedConfig) -> tuple[int, ...]:
    """The window of each layer in tokens, the token itself included; -1 where it attends to everything."""
    return tuple(config.sliding_window if kind == SLIDING else -1 for kind in layer_types(config))
