"""Weights from panels to what a matmul takes (docs/ops.md, "Panel layout"); folded when a model is opened.

With few nodes, since all that they make stays in memory until ONNX Runtime has folded all weights.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_passes.functions.body import Body

LANES, CHUNK = 16, 64


def codes(body: Body, weight: ir.Value, halves: int, bits: int) -> ir.Value:
    """Codes uint8 `[K, halves * N]`, those of the gate first; `bits` is the number of bits of all callers.

    Bytes are transposed while they are packed, which moves the fewest, and in two steps: 64 bytes of a vector stay
    together in the first, one axis moves in the second. ONNX Runtime takes 15 times as long to do both at once.
    """
    if halves == 1:  # a 0 keeps what the weight has
        split = body.reshape(weight, 0, 0, 2 * bits, 1, LANES, 4)
        together, apart = [1, 2, 3, 0, 4, 5], [0, 1, 2, 5, 3, 4]
    else:
        split = body.reshape(weight, _panels(body), halves, -1, 2 * bits, 1, LANES, 4)
        together, apart = [2, 3, 4, 1, 0, 5, 6], [0, 1, 2, 6, 3, 4, 5]
    rows = body.op("Transpose", body.op("Transpose", split, perm=together), perm=apart)
    # [chunk, vector, 1, j, half, panel, lane]
    if bits != 3:
        return _cut(body, _fields(body, rows, bits, halves), halves)
    low, high = body.ops("Split", rows, body.ints(2 * 2, 2 * 1), outputs=2, axis=1)
    shifted = body.op("BitShift", _fields(body, high, 1, halves), np.uint8(2), direction="LEFT")
    return _cut(body, body.op("BitwiseOr", _fields(body, low, 2, halves), shifted), halves)


def _fields(body: Body, plane: ir.Value, width: int, halves: int) -> ir.Value:
    """uint8 `[K of whole chunks, channels of whole panels]` of the bytes of a plane."""
    if width < 8:
        shifts = np.arange(0, 8, width, dtype=np.uint8).reshape(-1, *[1] * (halves + 2))
        shifted = body.op("BitShift", plane, shifts, direction="RIGHT")
        plane = body.op("BitwiseAnd", shifted, np.uint8((1 << width) - 1))
    return body.op("Flatten", plane, axis=4)


def _cut(body: Body, matrix: ir.Value, halves: int) -> ir.Value:
    """Without the columns and channels that are padding."""
    if any(int(k) % CHUNK for k in body.values["K"]):
        matrix = body.cut(matrix, 0, 0, body.attribute("K"))
    return _cut_channels(body, matrix, halves)


def _cut_channels(body: Body, matrix: ir.Value, halves: int) -> ir.Value:
    """`[..., halves * N]` of `[..., channels of whole panels]`."""
    if all(int(n) % LANES == 0 for n in body.values["N"]):
        return matrix
    if halves == 1:
        return body.cut(matrix, 1, 0, body.attribute("N"))
    apart = body.reshape(matrix, 0, halves, body.op("Mul", _panels(body), np.int64(LANES)))
    return body.op("Flatten", body.cut(apart, 2, 0, body.attribute("N")), axis=1)


def _panels(body: Body) -> ir.Value:
    """Panels of each half: int64 scalar."""
    return body.op("Div", body.op("Add", body.attribute("N"), np.int64(LANES - 1)), np.int64(LANES))


def scales(body: Body, packed: ir.Value, halves: int) -> ir.Value:
    """float32 `[blocks, halves * N]` of scales float16 `[panels, blocks, 16]`, those of the gate first."""
    floats = body.op("Cast", packed, to=ir.DataType.FLOAT)
    if halves == 1:
        turned = body.op("Transpose", floats, perm=[1, 0, 2])
    else:
        split = body.reshape(floats, _panels(body), halves, -1, LANES)
        turned = body.op("Transpose", split, perm=[2, 1, 0, 3])
    return _cut_channels(body, body.op("Flatten", turned, axis=1), halves)
