"""The calibration tokens of an export: kept for a run that goes on, and the same for all processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.text import TokenizedModel, calibration_tokens
from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions, parse_calib
from bdq_export.progress import Progress
from bdq_export.resume import ProgressStore, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shared_tokens(
    checkpoint: TokenizedModel,
    model: PreTrainedModel,
    options: ExportOptions,
    progress: Progress,
    store: ProgressStore,
) -> Tensor:
    """All tokens `[samples, seq_len]`: those of `store`, or new ones that the first process makes.

    Raises:
        InvalidInputError: see `calibration_tokens`.
    """
    found = store.load("tokens", lambda record: record.tensors["tokens"])
    if found is None:
        if parallel.is_first():
            source, samples, length = parse_calib(options.calib), options.samples, options.seq_len
            found = calibration_tokens(checkpoint, model, source, samples, length, options.seed, progress)
        found = parallel.tokens_from_first(found)
        store.save("tokens", Record(tensors={"tokens": found}))
    return found


def own_tokens(tokens: Tensor) -> Tensor:
    """The part of `tokens` that this process calibrates with.

    Raises:
        UsageError: fewer sequences than processes.
    """
    if len(tokens) < parallel.size():
        raise UsageError(
            f"{parallel.size()} processes share {len(tokens)} calibration sequences; start fewer processes or use "
            "more --calib-samples"
        )
    return parallel.shard(tokens)
