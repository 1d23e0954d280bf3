"""Tiny calibrations, and whether two of them are the same to the last bit."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bdq_export.calibrate import calibrate
from bdq_export.float_model import load_float_model
from bdq_export.options import ExportOptions
from bdq_export.progress import QuietProgress
from bdq_export.resume import NOWHERE
from bdq_models import Architecture, Dimensions

SMALL = {"calib_samples": 16, "calib_seq_len": 32}


@dataclass
class Described:
    """What calibration asks of a checkpoint."""

    config: dict[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    directory: Path


def calibrate_tiny(tiny, directory, store=NOWHERE, **options):
    """Calibrate a tiny model with the tokenizer of `directory`."""
    described = Described(tiny.config, tiny.architecture, tiny.dimensions, directory)
    model = load_float_model(described, tiny.weights)
    given = ExportOptions(**{**SMALL, **options})
    before = model(torch.arange(20)[None]).logits
    result = calibrate(described, model, tiny.weights, given, QuietProgress(), store)
    assert torch.equal(model(torch.arange(20)[None]).logits, before), "the float model is not back"
    return result


def same(one: Any, other: Any) -> bool:
    """Equal in every bit, order of mappings included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, each.name), getattr(other, each.name)) for each in dataclasses.fields(one))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other
