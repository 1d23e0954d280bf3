"""The archive of compiled images that the library embeds, and its manifest. Standard library only."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import lzma
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

ARCHIVE = "images.tar.xz"
MANIFEST = "manifest.json"
_ALIGNMENT = 64
# instructions have 16 bytes: bits of the position tell more than the byte before
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 4, "pb": 4}]


@dataclass(frozen=True)
class Entry:
    """One image for one target.

    Attributes:
        name: of the image and of its entry point.
        target: compute capability of a cubin; 0 for PTX, which the driver compiles.
        code: the image.
        shared: bytes of dynamic shared memory.
        threads: in a program.
    """

    name: str
    target: int
    code: bytes
    shared: int
    threads: int


def pack(entries: Sequence[Entry]) -> bytes:
    """tar.xz of `images.bin`, all of them, and `images.inc`, the table that C++ includes; the same bytes each time."""
    blob, rows = bytearray(), []
    for entry in entries:
        blob += bytes(-len(blob) % _ALIGNMENT)
        # the driver reads PTX up to a 0
        code = entry.code if entry.target else entry.code + b"\0"
        rows.append(f'{{"{entry.name}", {entry.target}, {len(blob)}, {len(code)}, {entry.shared}, {entry.threads}}},\n')
        blob += code
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in (("images.inc", "".join(rows).encode()), ("images.bin", bytes(blob))):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o644
            tar.addfile(info, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), filters=_FILTERS)


def unpack(archive: bytes) -> list[Entry]:
    """The inverse of `pack`.

    Raises:
        ValueError: not such an archive.
    """
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(archive))) as tar:
        parts = {member.name: tar.extractfile(member) for member in tar.getmembers()}
    table, blob = parts.get("images.inc"), parts.get("images.bin")
    if table is None or blob is None:
        raise ValueError(f"the archive holds {sorted(parts)}, expected images.inc and images.bin")
    entries, data = [], blob.read()
    for line in table.read().decode().splitlines():
        name, target, offset, size, shared, threads = json.loads(line.replace("{", "[").replace("},", "]"))
        code = data[offset : offset + size]
        entries.append(Entry(name, target, code if target else code[:-1], shared, threads))
    return entries


def manifest(entries: Sequence[Entry], archive: bytes, triton: str, details: Mapping[str, Any]) -> str:
    """JSON: what the images were made by and from, and the SHA-256 of each."""
    images: dict[str, Any] = {name: dict(detail) for name, detail in details.items()}
    for entry in entries:
        target = f"sm_{entry.target}" if entry.target else "ptx"
        images[entry.name].setdefault("sha256", {})[target] = hashlib.sha256(entry.code).hexdigest()
    content = {
        "triton": triton,
        "sources": sources_digest(),
        "archive": hashlib.sha256(archive).hexdigest(),
        "images": images,
    }
    return json.dumps(content, indent=1) + "\n"


def sources_digest() -> str:
    """SHA-256 of the kernels' sources without docstrings, whole-line comments and spaces."""
    digest = hashlib.sha256()
    folder = files("bdq_runtime.gpu").joinpath("kernels")
    for source in sorted(folder.iterdir(), key=lambda path: path.name):
        if not source.name.endswith(".py"):
            continue
        text = source.read_text()
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
                lines[node.body[0].lineno - 1 : node.body[0].end_lineno] = [
                    "" for _ in range(node.body[0].lineno - 1, node.body[0].end_lineno or 0)
                ]
        code = ["".join(line.split()) for line in lines if not line.lstrip().startswith("#")]
        digest.update(f"{source.name}:{''.join(code)}\n".encode())
    return digest.hexdigest()


def read_archive() -> list[Entry]:
    """The images of this package.

    Raises:
        FileNotFoundError: the package has none.
    """
    return unpack(files("bdq_runtime.gpu").joinpath("images", ARCHIVE).read_bytes())


def read_manifest() -> dict[str, Any]:
    """The manifest of this package.

    Raises:
        FileNotFoundError: the package has none.
    """
    content: dict[str, Any] = json.loads(files("bdq_runtime.gpu").joinpath("images", MANIFEST).read_text())
    return content
