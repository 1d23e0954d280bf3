"""Calibration tokens: sampled from the model itself, or cut from the user's text.

Text that the model writes needs no download and raises no question of licence, and it is spread over whatever the
model was trained on. Passages start as texts of the model do (`Openings`): half of them as a user's turn or at the
beginning of a text, half at a random word.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bdq_export.calibration.draw import draw
from bdq_export.calibration.kv_cache import preallocated_cache
from bdq_export.calibration.openings import FREE, Openings
from bdq_export.calibration.writer import text_writer
from bdq_export.errors import InvalidInputError
from bdq_export.progress import Progress, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 32 << 20
"""How much of a calibration file is read: calibration uses a few hundred KiB, and tokenizing takes time."""
LEAST_SEQUENCES = 2
"""One to calibrate on, one to measure on."""
PASSAGE = 256
"""Longest piece that is sampled in one go."""
_BATCH = 64


class TokenizedModel(Protocol):
    """What of a checkpoint calibration text needs."""

    @property
    def directory(self) -> Path:
        """The folder with tokenizer.json."""


def calibration_tokens(
    checkpoint: TokenizedModel,
    model: PreTrainedModel,
    source: str | Path,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress,
) -> Tensor:
    """Token ids `[samples, seq_len]` int64; fewer rows where a file has fewer (never less than two).

    Args:
        checkpoint: gives the tokenizer.
        model: the float model.
        source: "self" to sample from the model, or the path of a UTF-8 text file.
        samples: sequences.
        seq_len: tokens of each.
        seed: the same seed gives the same tokens on the same machine.
        progress: shows how far it is.

    Raises:
        InvalidInputError: the file is missing, empty, not UTF-8 text or too short.
    """
    if source == "self":
        return sample_tokens(model, samples, seq_len, seed, progress, Openings.of(checkpoint.directory))
    with progress.stage("calibration text"):
        text = read_text(Path(source))
        return cut_text(checkpoint, text, Path(source), samples, seq_len, seed)


def read_text(path: Path) -> str:
    """The beginning of a UTF-8 text file, at most `MAX_TEXT_BYTES`.

    Raises:
        InvalidInputError: the file cannot be read, is empty, or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        reason = error.strerror or error
        raise InvalidInputError(f"calibration file {path}: {reason}; give a UTF-8 text file or 'self'") from error
    cut = len(data) > MAX_TEXT_BYTES
    if not data.strip():
        raise InvalidInputError(f"calibration file {path} is empty; expected UTF-8 text")
    if b"\0" in data:
        raise InvalidInputError(f"calibration file {path} has NUL bytes, it is binary; expected UTF-8 text")
    try:
        return data[:MAX_TEXT_BYTES].decode("utf-8", errors="ignore" if cut else "strict")
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"calibration file {path} is not UTF-8 at byte {error.start}; convert it to UTF-8"
        ) from error


def cut_text(checkpoint: TokenizedModel, text: str, path: Path, samples: int, seq_len: int, seed: int) -> Tensor:
    """`samples` windows of `seq_len` tokens that do not overlap, drawn with `seed` from all over the text.

    Each starts with what the tokenizer puts before every text, inside `seq_len`.

    Raises:
        InvalidInputError: fewer than `LEAST_SEQUENCES` windows.
    """
    from bdq_runtime.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(checkpoint.directory)
    tokens = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    beginning = torch.tensor(tokenizer.beginning(), dtype=torch.int64)
    step = max(1, seq_len - len(beginning))
    windows = tokens.numel() // step
    if windows < LEAST_SEQUENCES:
        raise InvalidInputError(
            f"calibration file {path} has {tokens.numel()} tokens, expected at least {LEAST_SEQUENCES * step} "
            f"({LEAST_SEQUENCES} x {step}); give a longer text or a smaller --calib-seq-len"
        )
    if windows < samples:
        logger.warning("%s has text for %d of %d calibration sequences", path, windows, samples)
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    body = tokens[: windows * step].view(windows, step)[order]
    return torch.cat([beginning.expand(len(body), -1), body], 1)


@torch.inference_mode()
def sample_tokens(
    model: PreTrainedModel,
    samples: int,
    seq_len: int,
    seed: int,
    progress: Progress,
    openings: Openings = Openings(),  # noqa: B008 (frozen)
) -> Tensor:
    """Text that `model` writes at temperature 1: int64 `[samples, seq_len]`.

    A sequence is made of passages of at most `PASSAGE` tokens, each with its own opening: one that goes wrong does
    not spoil the rest, and many short passages side by side take less time than few long ones.
    """
    generator = torch.Generator().manual_seed(seed)
    passages = -(-seq_len // PASSAGE)
    length = -(-seq_len // passages)
    fixed = openings.draw(samples * passages, length, int(model.config.vocab_size), generator)
    restart = _restart(model, openings)
    with progress.stage("calibration text", total=fixed.numel()) as stage:
        writer = text_writer(model)
        rows = [_write(writer, batch, restart, generator, stage) for batch in torch.split(fixed, _BATCH)]
    return torch.cat(rows).view(samples, passages * length)[:, :seq_len].contiguous()


def _restart(model: PreTrainedModel, openings: Openings) -> tuple[Tensor, int] | None:
    """End-of-text tokens and what must follow them; None for models whose texts have no beginning."""
    ends = model.config.eos_token_id
    if ends is None or len(openings.beginning) != 1:
        return None
    return torch.tensor(ends if isinstance(ends, list) else [ends]), openings.beginning[0]


def _write(
    model: PreTrainedModel,
    fixed: Tensor,
    restart: tuple[Tensor, int] | None,
    generator: torch.Generator,
    stage: Stage,
) -> Tensor:
    """Fill the free places of `fixed` `[batch, length]`; column 0 has none."""
    cache = preallocated_cache(model.config, fixed.shape[1])
    written = [fixed[:, :1]]
    stage.advance(fixed.shape[0])
    for column in fixed[:, 1:].T[..., None]:
        output = model(input_ids=written[-1], past_key_values=cache, use_cache=True)
        token = draw(output.logits[:, -1].float(), generator)
        if restart is not None:
            token = torch.where(torch.isin(written[-1], restart[0]), restart[1], token)
        written.append(torch.where(column == FREE, token, column))
        stage.advance(fixed.shape[0])
    return torch.cat(written, 1)
