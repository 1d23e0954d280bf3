"""Weights from panels to what a matmul takes (docs/ops.md, "Panel layout"); folded when a model is opened."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

LANES, CHUNK = 16, 64


def codes(body: Body, weight: ir.Value, halves: int) -> list[ir.Value]:
    """Codes uint8 `[K, N]` of any number of bits; of each half, where the panels of two take turns.

    All vectors of 64 bytes of all planes become rows of bytes, one for each of their 4 columns j; the row and the shift
    of a column follow from its number. Bytes are transposed while they are packed, which moves the fewest.
    """
    return [_codes(body, rows) for rows in _rows(body, weight, halves)]


def _codes(body: Body, rows: ir.Value) -> ir.Value:
    bits = body.attribute("weight_bits")
    has_high_plane = 3 in body.values["weight_bits"]
    width = body.op("Gather", np.array([0, 1, 2, 2, 4, 5, 6, 7, 8]), bits, axis=0) if has_high_plane else bits
    unpacked = _fields(body, rows, width, np.int64(0))
    power = body.op("BitShift", np.uint8(1), body.op("Cast", width, to=ir.DataType.UINT8), direction="LEFT")
    low = body.op("BitwiseAnd", unpacked, body.op("Sub", power, np.uint8(1)))
    if not has_high_plane:
        return low
    # where there is no second plane this reads the first one again, and a mask of 0 drops it
    is_three = body.op("Equal", bits, np.int64(3))
    first = body.op("Where", is_three, np.int64(2 * 2), np.int64(0))
    high = _fields(body, rows, np.int64(1), first)
    high = body.op("BitwiseAnd", high, body.op("Cast", is_three, to=ir.DataType.UINT8))
    return body.op("BitwiseOr", low, body.op("BitShift", high, np.uint8(2), direction="LEFT"))


def _rows(body: Body, weight: ir.Value, halves: int) -> list[ir.Value]:
    """uint8 `[C * 2 bits * 4, N]`: chunk, vector and j of the bytes of each output channel, for each half."""
    split = body.reshape(weight, _panels(body), halves, body.op("Shape", weight, start=1, end=2), -1, LANES, 4)
    # [panel, half, chunk, vector, lane, j] -> [half, chunk, vector, j, panel, lane]
    return _each_half(body, body.op("Transpose", split, perm=[1, 2, 3, 5, 0, 4]), halves)


def _panels(body: Body) -> ir.Value:
    """Panels of each half: int64 scalar."""
    return body.op("Div", body.op("Add", body.attribute("N"), np.int64(LANES - 1)), np.int64(LANES))


def _each_half(body: Body, turned: ir.Value, halves: int) -> list[ir.Value]:
    """Matrices `[..., N]` of `[halves, ..., panels, 16]`.

    What is not needed is left out: all of these stay in memory until ONNX Runtime has folded all weights.
    """
    channels = body.op("Mul", _panels(body), np.int64(LANES))
    parts = [turned] if halves == 1 else body.ops("Split", turned, outputs=halves, axis=0, num_outputs=halves)
    matrices = [body.reshape(part, -1, channels) for part in parts]
    if all(int(n) % LANES == 0 for n in body.values["N"]):
        return matrices
    return [body.cut(matrix, 1, 0, body.attribute("N")) for matrix in matrices]


def _fields(body: Body, rows: ir.Value, width: ir.Value | np.generic, first: ir.Value | np.generic) -> ir.Value:
    """uint8 `[K, ...]`: for each column its byte of the plane of `width` bits whose first vector is `first`, shifted so
    that its field comes first.
    """
    columns = body.op("Range", np.int64(0), body.attribute("K"), np.int64(1))
    chunk, within = body.op("Div", columns, np.int64(CHUNK)), body.op("Mod", columns, np.int64(CHUNK))
    quad, j = body.op("Div", within, np.int64(4)), body.op("Mod", within, np.int64(4))
    fields = body.op("Div", np.int64(8), width)
    vectors = body.op("Mul", body.attribute("weight_bits"), np.int64(2))
    vector = body.op("Add", body.op("Add", body.op("Mul", chunk, vectors), first), body.op("Div", quad, fields))
    row = body.op("Add", body.op("Mul", vector, np.int64(4)), j)
    shift = body.op("Cast", body.op("Mul", body.op("Mod", quad, fields), width), to=ir.DataType.UINT8)
    return body.op("BitShift", body.op("Gather", rows, row, axis=0), body.reshape(shift, -1, 1), direction="RIGHT")


def scales(body: Body, packed: ir.Value, halves: int) -> list[ir.Value]:
    """float32 `[blocks, N]` of scales float16 `[panels, blocks, 16]`, for each half."""
    blocks = body.op("Shape", packed, start=1, end=2)
    split = body.reshape(body.op("Cast", packed, to=ir.DataType.FLOAT), -1, halves, blocks, LANES)
    return _each_half(body, body.op("Transpose", split, perm=[1, 2, 0, 3]), halves)
