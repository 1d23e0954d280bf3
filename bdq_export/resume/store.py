"""A folder of finished work that belongs to one calibration.

    FOLDER/fingerprint.json       what was calibrated and how (see `fingerprint`)
    FOLDER/NAME.safetensors       a record
    FOLDER/NAME.json              its size and SHA-256; written last, so a record without it does not count

Every file is written beside its name, synced and renamed. Work is asked for in the order in which it is done; after
the first piece that is missing or damaged nothing more is read, so what is read always belongs to what came before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from bdq_export import parallel
from bdq_export.checkpoint.json_file import read_json_object
from bdq_export.errors import InvalidInputError, ResourceError, UsageError
from bdq_export.resume.record import Record, from_bytes
from bdq_export.system_errors import is_disk_full

logger = logging.getLogger(__name__)

Found = TypeVar("Found")

FINGERPRINT = "fingerprint.json"
_SIZE_LIMIT = 1 << 20


class ProgressStore(Protocol):
    """Where finished work is kept."""

    def load(self, name: str, decode: Callable[[Record], Found]) -> Found | None:
        """What `decode` makes of the record `name`; None where the work is to be done (again)."""

    def save(self, name: str, record: Record) -> None:
        """Keep `record` under `name`, which may hold an older one."""


class _Nowhere:
    """Keeps nothing."""

    def load(self, name: str, decode: Callable[[Record], Found]) -> Found | None:
        return None

    def save(self, name: str, record: Record) -> None:
        pass


NOWHERE: ProgressStore = _Nowhere()


class _FolderStore:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._behind = False

    def load(self, name: str, decode: Callable[[Record], Found]) -> Found | None:
        data = self._read(name) if parallel.is_first() and not self._behind else None
        data = parallel.from_first(data)
        if data is not None:
            try:
                return decode(from_bytes(data))
            except (ValueError, KeyError, TypeError, IndexError) as error:
                self._damaged(name, str(error))
        self._behind = True
        return None

    def save(self, name: str, record: Record) -> None:
        if not parallel.is_first():
            return
        data = record.to_bytes()
        # The old sum must not vouch for new bytes, nor the new one for old bytes.
        with _writing(self._folder):
            with suppress(FileNotFoundError):
                self._sums(name).unlink()
            _write(self._records(name), data)
            _write(self._sums(name), json.dumps(_sums_of(data)).encode())

    def _read(self, name: str) -> bytes | None:
        if not self._sums(name).is_file() or not self._records(name).is_file():
            return None
        try:
            data = self._records(name).read_bytes()
            sums = read_json_object(self._sums(name), self._sums(name).name, _SIZE_LIMIT)
        except (OSError, InvalidInputError) as error:
            self._damaged(name, str(error))
            return None
        if sums != _sums_of(data):
            self._damaged(name, f"{len(data)} bytes that do not have the SHA-256 that was noted")
            return None
        return data

    def _damaged(self, name: str, reason: str) -> None:
        logger.warning("%s is damaged and done again: %s", self._records(name), " ".join(reason.split()))

    def _records(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _sums(self, name: str) -> Path:
        return self._folder / f"{name}.json"


def open_store(folder: Path, fingerprint: Mapping[str, Any]) -> ProgressStore:
    """The store in `folder`, which is made if it is not there.

    Args:
        folder: of this calibration alone.
        fingerprint: plain values that decide what is calculated.

    Raises:
        UsageError: the folder holds other files, or the progress of another calibration; the message says what
            differs.
        InvalidInputError: it cannot be used as a folder, or its fingerprint is damaged.
        ResourceError: the disk is full.
    """
    path = folder / FINGERPRINT
    if not parallel.is_first():
        return _FolderStore(folder)  # reads and writes through the first process
    if not path.is_file():
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(not entry.name.startswith(".") for entry in folder.iterdir()):
                raise UsageError(f"{folder} holds files but no {FINGERPRINT}; give --checkpoints a folder of its own")
            _write(path, json.dumps(dict(fingerprint), indent=2).encode())
        return _FolderStore(folder)
    found = read_json_object(path, str(path), _SIZE_LIMIT)
    # As JSON gives it back: tuples are lists there.
    wanted = json.loads(json.dumps(dict(fingerprint)))
    different = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if different:
        pairs = "; ".join(f"{name} was {_shown(found.get(name))}, is {_shown(wanted.get(name))}" for name in different)
        raise UsageError(
            f"{folder} holds the progress of another calibration: {pairs}; use the same again, or another folder"
        )
    return _FolderStore(folder)


def _shown(value: Any) -> str:
    text = "not given" if value is None else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:20]}…"


def _sums_of(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write(path: Path, data: bytes) -> None:
    """Put `data` at `path` whole or not at all, also when the power goes."""
    handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn the system's errors on writing into errors of the project."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(f"the disk of {folder} is full ({error}); free some space") from error
        raise InvalidInputError(
            f"{folder} cannot be written to ({error.strerror or error}); choose another --checkpoints folder"
        ) from error
