"""Reading a model: everything in its folder is untrusted data and is checked before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bdq_export.checkpoint.directory import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from bdq_export.checkpoint.gguf import convert_gguf
    from bdq_export.checkpoint.weights import to_checkpoint_names

__all__ = ["Checkpoint", "convert_gguf", "open_checkpoint", "to_checkpoint_names"]

_NEEDS_TORCH_OR_GGUF = {
    "convert_gguf": "bdq_export.checkpoint.gguf",
    "to_checkpoint_names": "bdq_export.checkpoint.weights",
}


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH_OR_GGUF:
        return getattr(import_module(_NEEDS_TORCH_OR_GGUF[name]), name)
    raise AttributeError(f"module 'bdq_export.checkpoint' has no attribute {name!r}")
