"""Signal to noise of quantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bdq_export.report.report import WeightError

if TYPE_CHECKING:
    from bdq_runtime.packing import QuantizedWeight

_LOSSLESS_DB = 200.0
_EVERY = 8
"""Every so many rows of a weight are compared: the figure is an average over hundreds of thousands of values."""


def sqnr_db(weight: npt.NDArray[Any], restored: npt.NDArray[Any]) -> float:
    """10·log10(Σw² / Σ(w - w')²) of two arrays of one shape; 200 when they are equal."""
    noise = float(np.square(weight - restored, dtype=np.float64).sum())
    signal = float(np.square(weight, dtype=np.float64).sum())
    if noise == 0:
        return _LOSSLESS_DB
    return 10 * float(np.log10(signal / noise)) if signal else -_LOSSLESS_DB


def weight_errors(weights: Mapping[str, Any], quantized: Mapping[str, QuantizedWeight]) -> tuple[WeightError, ...]:
    """The error of each quantized weight, in the order of `quantized`.

    Args:
        weights: float weights `[N, K]` by canonical name (`<module path>.weight`), torch tensors or arrays; those that
            were quantized, so folded ones where a transform was folded.
        quantized: by the same names.
    """
    return tuple(
        WeightError(
            module=name.removesuffix(".weight"),
            bits=weight.spec.bits,
            sqnr_db=sqnr_db(np.asarray(weights[name][::_EVERY], np.float32), _some_rows(weight).dequantize()),
        )
        for name, weight in quantized.items()
    )


def _some_rows(weight: QuantizedWeight) -> QuantizedWeight:
    zeros = weight.zero_points
    return replace(
        weight,
        codes=weight.codes[::_EVERY],
        scales=weight.scales[::_EVERY],
        zero_points=None if zeros is None else zeros[::_EVERY],
    )
