"""An ONNX model of one `bdq` node, without the onnx package: a GPU is tested where models run, not exported."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION

Array = npt.NDArray[Any]

_ELEMENTS = {"float32": 1, "uint8": 2, "int32": 6, "float16": 10}
_IR_VERSION, _OPSET = 10, 21


def one_node_model(
    operator: str, inputs: Mapping[str, Array], attributes: Mapping[str, Any], fed: frozenset[str]
) -> bytes:
    """A serialized ModelProto; inputs named in `fed` are graph inputs, the others initializers."""
    table = OPERATORS[operator]
    node = b"".join(
        [
            *(_text(1, name) for name in table.inputs),
            *(_text(2, name) for name in table.outputs),
            _text(3, "node"),
            _text(4, operator),
            *(_message(5, _attribute(name, value)) for name, value in attributes.items()),
            _text(7, DOMAIN),
        ]
    )
    graph = b"".join(
        [
            _message(1, node),
            _text(2, "one_node"),
            *(_message(5, _tensor(name, array)) for name, array in inputs.items() if name not in fed),
            *(_message(11, _value(name, table.inputs[name], inputs[name].ndim)) for name in inputs if name in fed),
            *(_message(12, _value(name, kind, None)) for name, kind in table.outputs.items()),
        ]
    )
    opsets = [_number(2, _OPSET), _text(1, DOMAIN) + _number(2, VERSION)]
    return b"".join([_number(1, _IR_VERSION), _message(7, graph), *(_message(8, opset) for opset in opsets)])


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + bytes([2 << 3 | 5]) + struct.pack("<f", value) + _number(20, 1)
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, 2)
    return _text(1, name) + _text(4, str(value)) + _number(20, 3)


def _tensor(name: str, array: Array) -> bytes:
    dims = b"".join(_number(1, size) for size in array.shape)
    data = np.ascontiguousarray(array).tobytes()
    return dims + _number(2, _ELEMENTS[str(array.dtype)]) + _text(8, name) + _message(9, data)


def _value(name: str, kind: str, rank: int | None) -> bytes:
    # a dimension with neither a value nor a name may have any size
    shape = b"" if rank is None else _message(2, b"".join(_message(1, b"") for _ in range(rank)))
    return _text(1, name) + _message(2, _message(1, _number(1, _ELEMENTS[kind]) + shape))


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())
