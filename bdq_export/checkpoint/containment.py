"""Which files of a model folder may be opened: regular files that stay inside the folder (or its Hub cache)."""

from __future__ import annotations

import stat
from pathlib import Path

from bdq_export.errors import InvalidInputError

MAX_NAME_BYTES = 255


def plain_file_name(name: object, where: str) -> str:
    """Return `name` if it is a bare file name.

    Raises:
        InvalidInputError: a path separator, a drive, NUL or another control character, '.', '..', or too long.
    """
    if not isinstance(name, str):
        raise InvalidInputError(f"{where} holds {type(name).__name__} as a file name; expected a string")
    forbidden = not name.isprintable() or any(character in name for character in '/\\:*?"<>|')
    if forbidden or name in ("", ".", "..") or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        raise InvalidInputError(
            f"{where} names the file {name[:80]!r}; expected a plain file name inside the model folder"
        )
    return name


def regular_file(directory: Path, name: str) -> Path:
    """Return `directory / name` after checking what it really is.

    A symlink is followed only to a file in the same folder, or, in a snapshot of the Hugging Face cache
    (`models--*/snapshots/<revision>`), to a blob of the same repository.

    Raises:
        InvalidInputError: missing, dangling, a loop, outside the folder, or no regular file.
    """
    path = directory / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except FileNotFoundError:
        state = "is a dangling symlink" if path.is_symlink() else "is missing"
        raise InvalidInputError(f"{name} {state} in {directory}; download the model again") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: symlink loop before Python 3.13
        raise InvalidInputError(f"{name} in {directory} cannot be opened: {' '.join(str(error).split())}") from None
    if not any(target.is_relative_to(root) for root in _roots(directory)):
        raise InvalidInputError(
            f"{name} is a symlink to {target}, outside the model folder; copy the file into {directory}"
        )
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "no regular file (a pipe, socket or device)"
        raise InvalidInputError(f"{name} in {directory} is {kind}; expected a regular file")
    return path


def _roots(directory: Path) -> tuple[Path, ...]:
    folder = directory.resolve()
    repository = folder.parent.parent
    if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
        return folder, repository / "blobs"
    return (folder,)
