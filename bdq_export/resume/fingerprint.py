"""What decides the numbers of a calibration: model, data, options and the versions of what calculates."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdq_export.options import ExportOptions, parse_calib

if TYPE_CHECKING:
    from bdq_export.checkpoint import Checkpoint

FORMAT = 7
"""Version of the records: of their layout, and of what a calibration with the same options does."""
LATER = ("accuracy_level", "full_logits", "min_top1")
"""Options that are used after calibration only: they may change between two runs. With a bit budget the accuracy level
decides what there is to choose, so the choices are part of the fingerprint."""


def fingerprint(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, Any]:
    """Plain values by name; a calibration goes on only where all are the same.

    Not among them: threads and processor, which may change the last bits of what is still to be done, and no more.

    Raises:
        InvalidInputError: the calibration file cannot be used.
    """
    import torch
    import transformers

    from bdq_export import __version__
    from bdq_export.quantize.target_bits import bit_choices

    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if field.name not in (*LATER, "calib")
    }
    return {
        "format": FORMAT,
        "bdq-export": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": checkpoint.content_hash(),
        "tokenizer": tokenizer_hash(checkpoint),
        "calib": calib_hash(options.calib),
        **given,
        "calib_samples": options.samples,
        "calib_seq_len": options.seq_len,
        "keep": list(options.keep),
        "bit_choices (by accuracy_level)": None if options.target_bits is None else list(bit_choices(options)),
    }


def tokenizer_hash(checkpoint: Checkpoint) -> str:
    """SHA-256 of the tokenizer's files and the chat template: they decide what text is sampled, and its tokens."""
    return _hash_of([path.read_bytes() for path in checkpoint.tokenizer_files])


def calib_hash(calib: str) -> str:
    """ "self", or SHA-256 of what calibration reads of the file, to the byte: its name does not matter.

    Raises:
        InvalidInputError: the file cannot be used.
    """
    from bdq_export.calibration.text import read_text

    source = parse_calib(calib)
    return _hash_of([read_text(source).encode()]) if isinstance(source, Path) else source


def _hash_of(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
