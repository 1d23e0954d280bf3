"""What `Body` computes at once instead of writing a node: a few operators on small constants.

ONNX Runtime would fold them too, but for each node of the model that calls the function, which takes longer to open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

MAX_SIZE = 256
"""Elements of the largest result that becomes a constant."""


def _divide(a: Array, b: Array) -> Array:
    result: Array = a // b if np.issubdtype(a.dtype, np.integer) else a / b
    return result


def _slice(x: Array, starts: Array, ends: Array, axes: Array) -> Array:
    index = [slice(None)] * x.ndim
    for start, end, axis in zip(starts, ends, axes, strict=True):
        index[axis] = slice(int(start), int(end))
    return x[tuple(index)]


def _concat(*parts: Array, axis: int) -> Array:
    return np.concatenate(parts, axis)


def _shift(x: Array, by: Array, direction: str) -> Array:
    result: Array = x << by if direction == "LEFT" else x >> by
    return result


def _cast(x: Array, to: ir.DataType) -> Array:
    return x.astype(to.numpy())


_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divide,
    "Mod": np.mod,
    "Min": np.minimum,
    "Max": np.maximum,
    "Neg": np.negative,
    "Equal": np.equal,
    "Greater": np.greater,
    "Less": np.less,
    "Not": np.logical_not,
    "Where": np.where,
    "BitShift": _shift,
    "Cast": _cast,
    "Concat": _concat,
    "Gather": lambda x, index, axis=0: np.take(x, index, axis),
    "Range": np.arange,
    "Reshape": lambda x, shape: x.reshape(shape),
    "Slice": _slice,
}


def folded(op_type: str, inputs: list[Array], attributes: Mapping[str, Any]) -> Array | None:
    """The output of a node on constants, or None where a node has to be written."""
    operator = _OPERATORS.get(op_type)
    if operator is None:
        return None
    result = np.asarray(operator(*inputs, **attributes))
    return result if result.size <= MAX_SIZE else None
