"""Weights rounded to nearest without a transform: nothing to calibrate, only something to verify by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from bdq_export.calibration.result import CalibrationResult
from bdq_export.calibration.selection import NONE
from bdq_export.calibration.text import calibration_tokens
from bdq_export.calibration.workspace import Workspace, round_ends
from bdq_export.options import ExportOptions, parse_calib
from bdq_export.progress import Progress
from bdq_export.quantize.specs import end_specs, linear_specs
from bdq_export.transform import Transforms

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bdq_export.checkpoint import Checkpoint

_UNCALIBRATED = (12, 24)
"""Sequences and tokens that are sampled only to verify a model that needs no calibration."""


def uncalibrated(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    options: ExportOptions,
    progress: Progress,
) -> CalibrationResult:
    """As `calibrate`, for plain rounding without a transform."""
    architecture, dimensions = checkpoint.architecture, checkpoint.dimensions
    samples, length = _UNCALIBRATED if options.calib == "self" else (2, options.seq_len)
    source = parse_calib(options.calib)
    held_back = calibration_tokens(checkpoint, model, source, samples, length, options.seed, progress)
    space = Workspace(checkpoint, model, architecture, dimensions, weights, held_back, linear_specs(options), progress)
    with progress.stage("round weights"):
        tied = f"{architecture.lm_head}.weight" not in weights
        quantized = round_ends(weights, end_specs(options, architecture, dimensions, tied))
        quantized.update(space.round_linears(weights, None))
    return CalibrationResult(NONE, "no transform was asked for", Transforms(), weights, quantized, held_back)
