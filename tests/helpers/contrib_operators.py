"""The two operators of ONNX Runtime that a model of `bdq` operators still has, for onnx's evaluator."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun

Array = npt.NDArray[Any]


class SkipSimplifiedLayerNormalization(OpRun):
    """RMS norm of a sum; the fourth output is the sum."""

    op_domain = "com.microsoft"

    def _run(self, x: Array, skip: Array, gain: Array, epsilon: float = 0.0) -> tuple[Array, ...]:
        total = x + skip
        scale = 1 / np.sqrt(np.mean(total * total, -1, keepdims=True) + np.float32(epsilon))
        empty = np.zeros(0, np.float32)
        return (total * scale * gain).astype(np.float32), empty, empty, total


class GatherBlockQuantized(OpRun):
    """Rows of a symmetric 8-bit table, in blocks along its last axis."""

    op_domain = "com.microsoft"

    def _run(
        self,
        data: Array,
        indices: Array,
        scales: Array,
        bits: int = 4,
        block_size: int = 128,
        gather_axis: int = 0,
        quantize_axis: int = 1,
    ) -> tuple[Array]:
        assert (bits, gather_axis, quantize_axis) == (8, 0, data.ndim - 1)
        rows = data[indices].astype(np.float32) - 128
        factors = np.repeat(scales[indices].astype(np.float32), block_size, -1)[..., : rows.shape[-1]]
        return ((rows * factors).astype(scales.dtype),)
