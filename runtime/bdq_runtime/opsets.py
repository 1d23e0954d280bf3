"""Which operator sets an ONNX file uses, read from the few bytes that say so: neither onnx nor a session is needed."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_OPSET_IMPORT = 8  # of ModelProto: OperatorSetIdProto
_DOMAIN, _VERSION = 1, 2  # of OperatorSetIdProto
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def opset_version(path: str | Path, domain: str) -> int | None:
    """The version of `domain` that the model imports; None when it does not, or the file is not ONNX.

    The graph and the weights are skipped, so this takes as long for any model.
    """
    with Path(path).open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        while file.tell() < size:
            key = _varint(file)
            length = 0
            if key & 7 == _VARINT:
                _varint(file)
            elif key & 7 == _BYTES:
                length = _varint(file)
            elif key & 7 in (_FIXED64, _FIXED32):
                length = 8 if key & 7 == _FIXED64 else 4
            else:
                return None
            end = min(file.tell() + length, size)
            if key >> 3 == _OPSET_IMPORT and key & 7 == _BYTES:
                name, version = _opset(file, end)
                if name == domain:
                    return version
            file.seek(end)
    return None


def _opset(file: BinaryIO, end: int) -> tuple[str, int]:
    name, version = "", 0
    while file.tell() < end:
        key = _varint(file)
        value = _varint(file)
        if key == _DOMAIN << 3 | _BYTES:
            name = file.read(min(value, end - file.tell())).decode(errors="replace")
        elif key == _VERSION << 3 | _VARINT:
            version = value
        else:
            break
    return name, version


def _varint(file: BinaryIO) -> int:
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80 or shift > 63:
            break
    return value
