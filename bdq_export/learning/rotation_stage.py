"""The stage that learns rotations before anything is folded: SpinQuant (arXiv 2405.16406).

Weights are float, activations and cache are rounded straight through, and the loss is that of the whole model: the
cross-entropy of the calibration tokens. Cayley SGD with the paper's rate, 1.5 falling linearly to 0, for its 100 steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.precision import fast_matmuls
from bdq_export.learning.end_to_end import checkpointed
from bdq_export.learning.heads import Heads
from bdq_export.learning.losses import Loss
from bdq_export.learning.rotations import Rotations
from bdq_export.progress import Progress

logger = logging.getLogger(__name__)

_CHECKS = 5
"""How often held-out tokens are looked at."""


@dataclass(frozen=True)
class RotationOptions:
    """How the stage runs.

    Attributes:
        steps: of Cayley SGD.
        batch: sequences a step.
        rate: first learning rate; falls linearly to 0.
        patience: looks at held-out tokens without a gain after which it stops.
        seed: of the order of sequences.
    """

    steps: int = 100
    batch: int = 1
    rate: float = 1.5
    patience: int = 3
    seed: int = 0


@dataclass(frozen=True)
class RotationResult:
    """What the stage found.

    Attributes:
        before: held-out loss of the first rotations, nats.
        after: the same of the best ones, which are those that stay; never more.
        steps: taken, stopped early or not.
    """

    before: float
    after: float
    steps: int


def learn(
    runner: BlockRunner,
    rotations: Rotations,
    head: Tensor,
    tokens: Tensor,
    judge: Callable[[], float],
    progress: Progress,
    options: RotationOptions | None = None,
) -> RotationResult:
    """Learn `rotations` of the model that `runner` runs, inside of a `RotationStudent.attached` context.

    Args:
        runner: of the model.
        rotations: changed in place; the best ones by `judge`, which may be those given.
        head: weight of lm_head `[vocab, hidden]` in `product_dtype`.
        tokens: to learn from, `[samples, seq_len]`, the same on every process.
        judge: held-out loss of what the model computes now, nats.
        progress: shows a stage with a step for each batch.
        options: of the stage.
    """
    options = options or RotationOptions()
    heads = Heads(head, head[:0])  # labels are the only target: no logits of a teacher
    every = max(1, options.steps // _CHECKS)
    before = best = judge()
    kept, misses, taken = rotations.values(), 0, 0
    with progress.stage("learn rotations", total=options.steps) as stage:
        for batch in islice(_batches(len(tokens), options), options.steps):
            _descend(runner, rotations, heads, tokens[batch])
            rotations.step(options.rate * (1 - taken / options.steps))
            taken += 1
            stage.advance()
            if taken % every and taken < options.steps:
                continue
            found = judge()
            logger.info("learned rotations: step %d of %d, held-out loss %.4f", taken, options.steps, found)
            misses = 0 if found < best else misses + 1
            if found < best:
                best, kept = found, rotations.values()
            if misses >= options.patience:
                break
    rotations.set_values(kept)
    return RotationResult(before, best, taken)


def _descend(runner: BlockRunner, rotations: Rotations, heads: Heads, batch: Tensor) -> None:
    """Put the gradients of the batch's mean loss, of all processes, into `rotations`."""
    mine = batch[parallel.rank() :: parallel.size()]
    if len(mine):
        labels = torch.cat([mine[:, 1:], torch.full_like(mine[:, :1], -1)], 1)
        with fast_matmuls():
            hidden = runner.differentiable(mine, checkpointed).flatten(0, 1)
            loss = heads.loss(Loss("ce"), hidden, hidden.detach(), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
    parallel.average_gradients(rotations, len(mine))


def _batches(count: int, options: RotationOptions) -> Iterator[Tensor]:
    """Places of sequences, pass after pass over all of them in another order."""
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        yield from torch.split(torch.randperm(count, generator=generator), options.batch)
