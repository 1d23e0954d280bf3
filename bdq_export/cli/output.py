"""Results on stdout: a table for people, JSON for programs."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Console, RenderableType


def print_result(data: dict[str, Any], text: RenderableType, as_json: bool) -> None:
    """Print `data` as JSON, or `text` as a table."""
    if as_json:
        print(json.dumps(_finite(data), indent=2))
    else:
        Console().print(text)


def _finite(value: Any) -> Any:
    """`value` with null for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
