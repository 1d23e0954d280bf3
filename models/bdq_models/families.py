"""The supported families, and which one a config.json belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bdq_models.architecture import Architecture
from bdq_models.gemma3 import GEMMA3
from bdq_models.llama import LLAMA
from bdq_models.mistral import MISTRAL
from bdq_models.phi3 import PHI3
from bdq_models.qwen2 import QWEN2
from bdq_models.qwen3 import QWEN3

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA3)}


def supported() -> tuple[str, ...]:
    """Names (`model_type`) of the supported families."""
    return tuple(FAMILIES)


def get_architecture(config: Mapping[str, Any]) -> Architecture:
    """The family that a config.json describes.

    Args:
        config: the parsed config.json; `model_type` and `architectures[0]` must agree where both are given.

    Raises:
        LookupError: unknown family, or a class other than the family's causal LM; names the supported ones.
    """
    model_type = config.get("model_type")
    classes = config.get("architectures")
    class_name = classes[0] if isinstance(classes, list) and classes else None
    for family in FAMILIES.values():
        if model_type in (None, family.name) and class_name in family.classes:
            return family
        if model_type == family.name and class_name is None:
            return family
    known = ", ".join(f"{family.name} ({family.classes[0]})" for family in FAMILIES.values())
    raise LookupError(f"model_type {model_type!r} with class {class_name!r} is not supported; supported: {known}")
