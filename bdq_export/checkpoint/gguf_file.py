"""The header of a GGUF file (version 2 and 3, little endian), every count and length checked against the file.

The `gguf` package knows how to dequantize; its reader, however, believes the counts of the file, and takes
seconds for a vocabulary of 262,144 tokens.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdq_export.errors import InvalidInputError

MAX_TENSORS = 100_000
MAX_FIELDS = 10_000
MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_SMALLEST_STRING = 8


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file.

    Attributes:
        shape: row-major, as in torch (the file stores it reversed).
        kind: ggml type number.
        offset: first byte, relative to the start of the data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file with a checked header.

    Attributes:
        path: the file.
        metadata: key -> int, float, bool, str, list of str, or numpy array of numbers.
        tensors: name -> where it is.
        data_start: position of the tensor data in the file.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int


class _Cursor:
    """Reads values from the mapped file; running off its end is an InvalidInputError."""

    def __init__(self, data: np.memmap[Any, np.dtype[np.uint8]], what: str) -> None:
        self.data = data
        self.what = what
        self.position = 0

    def take(self, count: int) -> int:
        """Move over `count` bytes and return where they begin."""
        start = self.position
        if count > self.data.size - start:
            raise InvalidInputError(
                f"{self.what}: {count} bytes are claimed at byte {start} but the file has {self.data.size}; "
                "it is truncated, download it again"
            )
        self.position = start + count
        return start

    def scalar(self, code: str) -> Any:
        start = self.take(struct.calcsize(code))
        return struct.unpack(code, self.data[start : self.position].tobytes())[0]

    def string(self) -> str:
        length = self.scalar("<Q")
        start = self.take(length)
        return self.data[start : self.position].tobytes().decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise InvalidInputError(f"{self.what}: unknown value type {kind} at byte {self.position}")
        return self.scalar(_SCALARS[kind])

    def _array(self) -> Any:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            if length * _SMALLEST_STRING > self.data.size - self.position:
                raise InvalidInputError(f"{self.what}: an array claims {length} strings; the file is too short")
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise InvalidInputError(f"{self.what}: arrays of value type {kind} are not supported")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(length * dtype.itemsize)
        return np.frombuffer(self.data[start : self.position], dtype=dtype)


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of `path`.

    Raises:
        InvalidInputError: no GGUF file, an unsupported version, or a count or length beyond the file.
    """
    what = path.name
    try:
        if not path.is_file() or path.stat().st_size < 24:
            raise InvalidInputError(f"{path} is no GGUF file: expected a regular file of at least 24 bytes")
        cursor = _Cursor(np.memmap(path, mode="r", dtype=np.uint8), what)
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be read: {error.strerror}") from None
    if cursor.data[:4].tobytes() != b"GGUF":
        raise InvalidInputError(f"{path} is no GGUF file: it does not start with 'GGUF'")
    cursor.position = 4
    version = cursor.scalar("<I")
    if version not in (2, 3):
        raise InvalidInputError(f"{what} has GGUF version {version}; supported: 2, 3 (little endian)")
    tensor_count, field_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    if tensor_count > MAX_TENSORS or field_count > MAX_FIELDS:
        raise InvalidInputError(
            f"{what} claims {tensor_count} tensors and {field_count} fields; "
            f"at most {MAX_TENSORS} and {MAX_FIELDS} are read"
        )
    metadata = {cursor.string(): cursor.value(cursor.scalar("<I")) for _ in range(field_count)}
    tensors = {cursor.string(): _tensor(cursor) for _ in range(tensor_count)}
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise InvalidInputError(f"{what}: general.alignment is {alignment!r}; expected a power of two")
    return GgufFile(path, metadata, tensors, -(-cursor.position // alignment) * alignment)


def _tensor(cursor: _Cursor) -> GgufTensor:
    dimensions = cursor.scalar("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise InvalidInputError(f"{cursor.what}: a tensor has {dimensions} dimensions; at most {MAX_DIMENSIONS}")
    shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))[::-1]
    return GgufTensor(shape, kind=cursor.scalar("<I"), offset=cursor.scalar("<Q"))
