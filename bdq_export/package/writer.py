"""Write an export so that it is there whole or not at all.

    with staged_output(layout, force) as staged:
        staged.save_model(model)
        verify(staged.onnx_path, ...)
        staged.write("README.md", card)
        paths = staged.publish()

Everything is written into a hidden folder on the file system of OUT, synced to disk, and renamed into place at the
end; leaving the block in any other way (an error, Ctrl-C, SIGTERM) removes it and leaves what was at OUT as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bdq_export.errors import BdqError, InvalidInputError, ResourceError
from bdq_export.package.layout import SUMS, UNSUMMED, Layout, check_names, earlier_names
from bdq_export.system_errors import errno_of, is_disk_full, signals_as_exceptions

if TYPE_CHECKING:
    import onnx_ir as ir

INLINE_BYTES = 1024
"""Initializers up to this size stay in the .onnx file, where shape inference can read them."""
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)
_CHUNK = 1 << 20


@dataclass
class StagedOutput:
    """An export being written: the files so far, in a folder that nobody else sees.

    Attributes:
        layout: where `publish` puts them.
        folder: where they are now.
        force: replace what an earlier export wrote.
    """

    layout: Layout
    folder: Path
    force: bool
    _names: list[str] = field(default_factory=list)
    _published: bool = False

    @property
    def onnx_path(self) -> Path:
        """The model file as it is now, to be opened by path."""
        return self.folder / self.layout.onnx_name

    def save_model(self, model: ir.Model) -> None:
        """Write the model and its external data; the same model gives the same bytes.

        Raises:
            ResourceError: the disk is full.
            InvalidInputError: the folder cannot be written to.
        """
        import onnx_ir as ir

        _align_by_item_size(model)
        with _output_errors(self.layout.folder):
            ir.save(
                model,
                self.onnx_path,
                external_data=self.layout.data_name,
                size_threshold_bytes=INLINE_BYTES,
            )
        self._names.append(self.layout.onnx_name)
        if (self.folder / self.layout.data_name).exists():
            self._names.append(self.layout.data_name)

    def write(self, name: str, content: bytes) -> None:
        """Write a side file.

        Raises:
            ValueError: `name` is not a plain file name.
            ResourceError: the disk is full.
            InvalidInputError: the folder cannot be written to.
        """
        if name != Path(name).name or name in ("", ".", ".."):
            raise ValueError(f"{name!r} is not a plain file name")
        with _output_errors(self.layout.folder):
            (self.folder / name).write_bytes(content)
        if name not in self._names:
            self._names.append(name)

    def sizes(self) -> dict[str, int]:
        """Bytes of each file written so far, by name in alphabetical order."""
        return {name: (self.folder / name).stat().st_size for name in sorted(self._names)}

    def publish(self) -> tuple[Path, ...]:
        """Write SHA256SUMS, sync, and rename everything into place, the model file last.

        Returns:
            The paths of all files, the model first.

        Raises:
            UsageError, InvalidInputError: a name is taken (see `check_names`); nothing was changed.
            ResourceError: the disk is full; nothing was changed.
        """
        self.write(SUMS, _sums(self.folder, self._names).encode())
        check_names(self.layout, self._names, self.force)
        with _output_errors(self.layout.folder):
            mode = 0o666 & ~_umask()
            for name in self._names:
                (self.folder / name).chmod(mode)
                _sync(self.folder / name)
            _sync(self.folder)
            self._rename()
        self._published = True
        first = self.layout.onnx_name
        return tuple(self.layout.folder / name for name in sorted(self._names, key=lambda n: (n != first, n)))

    def _rename(self) -> None:
        target = self.layout.folder
        if target.is_dir():
            _replace_files(self.folder, target, self._names, self.layout)
            _sync(target)
        else:
            self.folder.chmod(0o777 & ~_umask())
            self.folder.rename(target)
            _sync(target.parent)


@contextmanager
def staged_output(layout: Layout, force: bool = False) -> Iterator[StagedOutput]:
    """A folder to write the export into, gone at the end of the block unless it was published.

    Raises:
        InvalidInputError: the folder of OUT cannot be written to.
        ResourceError: the disk is full.
    """
    # inside OUT's folder where there is one, so that renames never cross a mount point
    beside = layout.folder if layout.folder.is_dir() else layout.folder.parent
    with signals_as_exceptions():
        with _output_errors(beside):
            folder = Path(tempfile.mkdtemp(prefix=".bdq-export-", dir=beside))
        try:
            yield StagedOutput(layout, folder, force)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _replace_files(staged: Path, target: Path, names: list[str], layout: Layout) -> None:
    """Move `names` over what is in `target`, keeping what they replace until all is in place.

    The old model goes first and the new one comes last: a power cut in between leaves no model at OUT, never a model
    with another one's data.
    """
    order = sorted(names, key=lambda name: (name == layout.onnx_name, name))
    stale = earlier_names(target) - {layout.onnx_name, layout.data_name} - set(names)
    stale = frozenset(name for name in stale if not name.lower().endswith((".onnx", ".onnx.data")))
    kept = staged / ".replaced"
    kept.mkdir()
    saved: list[str] = []
    placed: list[str] = []
    try:
        for name in [*reversed(order), *sorted(stale)]:
            if (target / name).exists():
                (target / name).replace(kept / name)
                saved.append(name)
        for name in order:
            (staged / name).replace(target / name)
            placed.append(name)
    except BaseException:
        for name in placed:
            with suppress(OSError):
                (target / name).unlink()
        for name in reversed(saved):
            with suppress(OSError):
                (kept / name).replace(target / name)
        raise


def _align_by_item_size(model: ir.Model) -> None:
    """Order the initializers by descending item size: data packed densely in that order is naturally aligned."""
    initializers = model.graph.initializers
    values = sorted(
        initializers.values(), key=lambda v: -v.const_value.dtype.itemsize if v.const_value is not None else 0
    )
    initializers.clear()
    for value in values:
        initializers.add(value)


def _sums(folder: Path, names: list[str]) -> str:
    """The text of SHA256SUMS, as `sha256sum --check` reads it."""
    lines = []
    for name in sorted(set(names) - {SUMS, *UNSUMMED}):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)


def _sync(path: Path) -> None:
    """Have the system put a file or a folder on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folder, and journals renames itself
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The process's mask of new files' permissions; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextmanager
def _output_errors(folder: Path) -> Iterator[None]:
    """Turn the system's errors on writing into one-line errors of the project."""
    try:
        yield
    except BdqError:
        raise
    except OSError as error:
        if is_disk_full(error):
            raise ResourceError(
                f"the disk of {folder} is full ({error}); free some space or choose another OUT"
            ) from error
        code = errno_of(error)
        if code in _READ_ONLY:
            raise InvalidInputError(
                f"{folder} cannot be written to ({os.strerror(code)}); choose another OUT or change its permissions"
            ) from error
        raise
