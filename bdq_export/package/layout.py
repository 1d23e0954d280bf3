"""Where the files of an export go, and which existing files may be replaced.

OUT that ends in `.onnx` is that file; `<name>.onnx.data` and the side files go beside it. Any other OUT is a folder
with `model.onnx` in it. What an earlier export wrote is known from the `SHA256SUMS` it left.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bdq_export.errors import InvalidInputError, UsageError

SUMS = "SHA256SUMS"
REPORT_JSON = "bdq_report.json"
REPORT_HTML = "report.html"
UNVERIFIED = "UNVERIFIED"
UNSUMMED = (REPORT_JSON, REPORT_HTML)
"""Files with times and memory in them: they differ between two runs, so `SHA256SUMS` leaves them out."""

_ALWAYS_WRITTEN = (
    "README.md",
    "bdq_config.json",
    "config.json",
    "genai_config.json",
    "tokenizer.json",
    SUMS,
    REPORT_JSON,
    REPORT_HTML,
)
_SUMS_LIMIT = 1 << 20


@dataclass(frozen=True)
class Layout:
    """Where one export goes.

    Attributes:
        folder: holds every file of the export.
        onnx_name: file name of the model.
    """

    folder: Path
    onnx_name: str

    @property
    def onnx_path(self) -> Path:
        """The model file."""
        return self.folder / self.onnx_name

    @property
    def data_name(self) -> str:
        """File name of the external data."""
        return self.onnx_name + ".data"


def resolve_layout(out: Path) -> Layout:
    """The layout that OUT names; nothing on disk is looked at."""
    if out.suffix.lower() == ".onnx":
        return Layout(out.parent, out.name)
    return Layout(out, "model.onnx")


def check_output(out: Path, force: bool) -> Layout:
    """The layout of OUT, after the checks that can be made before the work starts.

    Raises:
        UsageError: OUT exists and `force` is off.
        InvalidInputError: the folder above OUT is missing or read-only, or something at OUT is not what it must be.
    """
    layout = resolve_layout(out)
    folder = layout.folder
    parent = folder if out.suffix.lower() == ".onnx" else folder.parent
    if not parent.is_dir():
        raise InvalidInputError(f"the output folder {parent} does not exist; create it first")
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"the output {folder} is a file, expected a folder or a name ending in .onnx")
    if folder.is_symlink() and not folder.exists():
        raise InvalidInputError(f"the output {folder} is a symbolic link to nothing; remove it or choose another")
    nearest = folder if folder.is_dir() else parent
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise InvalidInputError(f"the output folder {nearest} is read-only; choose another or change its permissions")
    for name in (layout.onnx_name, layout.data_name):
        _check_replaceable(folder / name, force)
    if not force and (folder / SUMS).exists():
        raise UsageError(f"{folder} already holds an export; give --force to replace it, or choose another OUT")
    check_names(layout, list(_ALWAYS_WRITTEN), force)
    return layout


def check_names(layout: Layout, names: list[str], force: bool) -> None:
    """Refuse to overwrite what is not ours.

    Args:
        layout: of the export.
        names: file names that are about to be written.
        force: replace what an earlier export wrote.

    Raises:
        UsageError: a file exists that an earlier export wrote, and `force` is off.
        InvalidInputError: a file exists that no export wrote, or a name is taken by a link or a folder.
    """
    ours = {layout.onnx_name, layout.data_name, *earlier_names(layout.folder)}
    for name in names:
        target = layout.folder / name
        _check_replaceable(target, force or name not in ours)
        if target.exists() and name not in ours:
            raise InvalidInputError(
                f"{target} exists and was not written by bdq-export, so not even --force replaces it; "
                "choose an OUT in a folder of its own"
            )


def _check_replaceable(target: Path, force: bool) -> None:
    if target.is_symlink():
        raise InvalidInputError(f"{target} is a symbolic link, expected a plain file; remove it or choose another OUT")
    if target.exists() and not target.is_file():
        raise InvalidInputError(f"{target} is not a plain file; remove it or choose another OUT")
    if target.exists() and not force:
        raise UsageError(f"{target} already exists; give --force to replace it, or choose another OUT")


def earlier_names(folder: Path) -> frozenset[str]:
    """File names that an earlier export wrote into `folder`, after its `SHA256SUMS`; empty when there is none."""
    sums = folder / SUMS
    if sums.is_symlink() or not sums.is_file() or sums.stat().st_size > _SUMS_LIMIT:
        return frozenset()
    names = {SUMS, UNVERIFIED, *UNSUMMED}
    for line in sums.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, separator, name = line.partition("  ")
        if separator and len(digest) == 64 and name == Path(name).name:
            names.add(name)
    return frozenset(names)
