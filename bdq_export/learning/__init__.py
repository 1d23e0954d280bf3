"""What gradients find: scales on both sides of the quantized weights, gains of norms, diagonals and clips."""

from __future__ import annotations

from bdq_export.learning.end_to_end import Sequences, TuningOptions, TuningResult, tune
from bdq_export.learning.state import QuantizedModel

__all__ = ["QuantizedModel", "Sequences", "TuningOptions", "TuningResult", "tune"]
