"""Download of a model folder by its Hugging Face hub id; only data files, never code or pickles."""

from __future__ import annotations

import re
from pathlib import Path

from bdq_export.errors import InvalidInputError, MissingDependencyError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_DATA_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt"]


def is_hub_id(text: str) -> bool:
    """Whether `text` can be a hub id: `organisation/name`, and no local folder is called `organisation`."""
    return _HUB_ID.fullmatch(text) is not None and not Path(text).parent.exists()


def download(hub_id: str) -> Path:
    """The local snapshot of `hub_id`; files that are there already are not downloaded again.

    Raises:
        InvalidInputError: offline, no such model, or a gated one.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError(
            f"{hub_id} is no local folder, and downloading it needs huggingface_hub: pip install 'bdq-export[export]'"
        ) from None
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_DATA_FILES))
    except Exception as error:  # one of a dozen classes of the hub client and of its HTTP library
        reason = " ".join(str(error).split())[:160]
        raise InvalidInputError(
            f"{hub_id} is no local folder and cannot be downloaded ({type(error).__name__}: {reason}); "
            "go online, log in for a gated model, or give the path of a local folder"
        ) from None
