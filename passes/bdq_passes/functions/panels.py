"""Weights from panels to what a matmul takes (docs/ops.md, "Panel layout"); folded when a model is opened."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

LANES, CHUNK = 16, 64


def codes(body: Body, weight: ir.Value, bits: int, halves: int) -> ir.Value:
    """Codes uint8 `[K, halves * N]` of `bits` bits; two halves are the panels in turn.

    Bytes are transposed while they are packed, which moves the fewest.
    """
    if bits == 3:
        low = _plane(body, body.cut(weight, 2, 0, 2 * 128), 2, halves)
        high = _plane(body, body.cut(weight, 2, 2 * 128, 3 * 128), 1, halves)
        unpacked = body.op("BitwiseOr", low, body.op("BitShift", high, np.uint8(2), direction="LEFT"))
    else:
        unpacked = _plane(body, weight, bits, halves)
    ends = body.shape(body.attribute("K"), body.attribute("N"))
    padded = body.reshape(unpacked, 0, halves, -1)  # [64 C, halves, 16 panels]
    return body.reshape(body.op("Slice", padded, body.ints(0, 0), ends, body.ints(0, 2)), 0, -1)


def _plane(body: Body, plane: ir.Value, bits: int, halves: int) -> ir.Value:
    """uint8 `[64 C, halves * 16 * panels]` of one plane `[panels, C, 128 * bits]`, its fields of `bits` bits."""
    fields, vectors = 8 // bits, 2 * bits
    split = body.reshape(plane, -1, halves, _chunks(body), vectors, LANES, 4)
    # [panel, half, chunk, vector, lane, j] -> [chunk, vector, j, half, panel, lane]
    turned = body.op("Transpose", split, perm=[2, 3, 5, 1, 0, 4])
    if fields == 1:
        return body.reshape(turned, body.op("Mul", _chunks(body), np.int64(CHUNK)), -1)
    rows = body.reshape(turned, body.op("Mul", _chunks(body), np.int64(vectors)), 1, 4, -1)
    parts = []
    for field in range(fields):
        part = rows if field == 0 else body.op("BitShift", rows, np.uint8(bits * field), direction="RIGHT")
        last = field == fields - 1
        parts.append(part if last else body.op("BitwiseAnd", part, np.uint8((1 << bits) - 1)))
    return body.reshape(body.op("Concat", *parts, axis=1), body.op("Mul", _chunks(body), np.int64(CHUNK)), -1)


def _chunks(body: Body) -> ir.Value:
    return body.op("Div", body.op("Add", body.attribute("K"), np.int64(CHUNK - 1)), np.int64(CHUNK))


def scales(body: Body, packed: ir.Value, halves: int) -> ir.Value:
    """float32 `[blocks, halves * N]` of scales float16 `[panels, blocks, 16]`."""
    split = body.reshape(
        body.op("Cast", packed, to=ir.DataType.FLOAT), -1, halves, body.op("Shape", packed, start=1, end=2), LANES
    )
    turned = body.op("Transpose", split, perm=[2, 1, 0, 3])
    padded = body.reshape(turned, 0, halves, -1)
    return body.reshape(body.cut(padded, 2, 0, body.attribute("N")), 0, -1)
