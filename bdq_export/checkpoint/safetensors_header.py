"""The header of a safetensors file, validated before anything of the size it claims is allocated.

Layout of the file: 8 bytes little-endian length n, n bytes of JSON, then the data. The JSON maps a tensor name to
`{"dtype", "shape", "data_offsets": [begin, end]}`, offsets relative to the data; `__metadata__` maps str to str.
The safetensors library reads the tensors; this check comes first because its messages do not say what to do, and
because a header must be known to be consistent before sizes from it reach the rest of the program.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bdq_export.checkpoint.json_file import parse_json_object
from bdq_export.errors import InvalidInputError

MAX_HEADER_BYTES = 100_000_000
MAX_ENTRIES = 100_000
MAX_DIMENSIONS = 8
MAX_NAME_LENGTH = 512
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_QUANTIZED = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "F8", "F6", "F4")
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: "F32", "F16" or "BF16".
        shape: sizes, all >= 0.
        begin: first byte, relative to the start of the data.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Validate the header of the regular file `path` and return its tensors by name.

    Raises:
        InvalidInputError: truncated, lying or inconsistent header, a dtype that is no float weight, or a file
            that is something else (pickle, GGUF, a git-lfs pointer).
    """
    what = path.name
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = _header_length(prefix, size, what)
            raw = file.read(length)
    except OSError as error:
        raise InvalidInputError(f"{what} cannot be read: {error.strerror}") from error
    return parse_header(raw, size - 8 - length, what)


def parse_header(raw: bytes, data_bytes: int, what: str) -> dict[str, TensorEntry]:
    """Parse the JSON part of a header.

    Args:
        raw: the JSON, possibly padded with spaces.
        data_bytes: bytes that follow the header in the file.
        what: how an error message names the file.

    Raises:
        InvalidInputError: see `read_header`.
    """
    if not raw.startswith(b"{"):
        raise InvalidInputError(f"{what}: the header does not start with '{{'; the file is no safetensors file")
    # Bounds the number of JSON values before Python objects are made of them.
    if raw.count(b",") > 16 * MAX_ENTRIES or raw.count(b'"data_offsets"') > MAX_ENTRIES:
        raise InvalidInputError(f"{what}: the header lists more than {MAX_ENTRIES} tensors")
    fields = parse_json_object(raw, f"{what}: the header")
    _check_metadata(fields.pop("__metadata__", {}), what)
    if len(fields) > MAX_ENTRIES:
        raise InvalidInputError(f"{what}: the header lists {len(fields)} tensors; at most {MAX_ENTRIES} are read")
    entries = {name: _entry(name, value, what) for name, value in fields.items()}
    _check_coverage(entries, data_bytes, what)
    return entries


def _header_length(prefix: bytes, size: int, what: str) -> int:
    if prefix.startswith(_PICKLE_MAGICS):
        raise InvalidInputError(
            f"{what} is a pickle with another name, which can run code when loaded; save the model as safetensors"
        )
    if prefix.startswith(b"GGUF"):
        raise InvalidInputError(f"{what} is a GGUF file; rename it to .gguf and give its path instead of the folder")
    if prefix == b"version ":
        raise InvalidInputError(f"{what} is a git-lfs pointer, not the weights; run `git lfs pull`")
    if len(prefix) < 8:
        raise InvalidInputError(f"{what} has {size} bytes; a safetensors file has at least 8: it is truncated")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        raise InvalidInputError(
            f"{what} claims a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed: "
            "the file is damaged or no safetensors file"
        )
    if length > size - 8:
        raise InvalidInputError(
            f"{what} claims a header of {length} bytes but has {size} bytes in all: it is truncated, download it again"
        )
    return length


def _check_metadata(metadata: Any, what: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidInputError(f"{what}: __metadata__ in the header must map strings to strings")


def _entry(name: str, value: Any, what: str) -> TensorEntry:
    """Check one entry by itself: fields, dtype, shape, and `end - begin` against the product of the shape."""
    where = f"{what}: tensor {name[:80]!r}"
    if len(name) > MAX_NAME_LENGTH or not name or not name.isprintable():
        raise InvalidInputError(f"{where} has a name that is empty, unprintable or longer than {MAX_NAME_LENGTH}")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise InvalidInputError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    _check_dtype(dtype, where)
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise InvalidInputError(f"{where} has a shape that is no list of at most {MAX_DIMENSIONS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InvalidInputError(f"{where} has data_offsets that are no pair begin <= end")
    count = 1
    for size in shape:
        count *= size
    expected = count * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise InvalidInputError(
            f"{where} of {dtype} {shape} needs {expected} bytes but its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _check_dtype(dtype: Any, where: str) -> None:
    if isinstance(dtype, str) and dtype in ITEM_BYTES:
        return
    if isinstance(dtype, str) and dtype.startswith(_QUANTIZED):
        raise InvalidInputError(
            f"{where} is {dtype[:16]}: the checkpoint is already quantized; "
            f"export from the original float weights ({', '.join(ITEM_BYTES)})"
        )
    raise InvalidInputError(f"{where} has dtype {str(dtype)[:16]!r}; expected one of {', '.join(ITEM_BYTES)}")


def _are_sizes(values: Any) -> bool:
    """Whether `values` is a list of integers from 0 to 2^63 - 1 (JSON true is no integer)."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_coverage(entries: dict[str, TensorEntry], data_bytes: int, what: str) -> None:
    """The tensors, ordered by offset, must fill the data without overlap, gap or remainder."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise InvalidInputError(
                f"{what}: tensor {name[:80]!r} starts at byte {entry.begin}, expected {position}: it {kind}"
            )
        position = entry.end
    if position != data_bytes:
        state = "it is truncated, download it again" if position > data_bytes else "bytes are left over at the end"
        raise InvalidInputError(f"{what} has {data_bytes} bytes of data but its header describes {position}: {state}")
