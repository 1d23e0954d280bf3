"""Results on stdout: a table for people, JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console, RenderableType


def print_result(data: dict[str, Any], text: RenderableType, as_json: bool) -> None:
    """Print `data` as JSON, or `text` as a table."""
    if as_json:
        print(json.dumps(data, indent=2))
    else:
        Console().print(text)
