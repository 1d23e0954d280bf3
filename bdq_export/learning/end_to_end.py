"""The end-to-end stage: scales around fixed codes are learned so that the whole model answers as the float one does.

What GPTQ leaves is an error that every block adds to. Codes are not touched: factors on rows, on rotated inputs, on
gains of norms, and clips. Those are the diagonals on both sides of every quantized product, which is what a transform
`Λa R Λb` can still move once codes are fixed. Backbone frozen, AdamW with a cosine, gradient checkpointing by block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.learning.heads import Heads
from bdq_export.learning.losses import Loss
from bdq_export.learning.parameters import Parameters
from bdq_export.learning.tuning_state import TuningState
from bdq_export.process_memory import return_freed_memory
from bdq_export.progress import Progress
from bdq_export.resume import NOWHERE, ProgressStore

logger = logging.getLogger(__name__)

_WARM_UP = 8
_LAST_RATE = 0.02
_CHECKS = 8
"""How often held-out tokens are looked at."""
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class TuningOptions:
    """How the stage runs.

    Attributes:
        epochs: passes over the tokens.
        batch: sequences a step.
        rate: learning rate of logarithms and clips alike.
        patience: checks without a gain after which it stops.
        loss: what is minimised; held-out tokens are judged by KL(float ‖ quantized) whatever it is.
        seed: of the order of sequences.
    """

    epochs: int = 3
    batch: int = 2
    rate: float = 3e-3
    patience: int = 3
    loss: Loss = field(default_factory=Loss)
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Sequences:
    """Tokens and what the float model makes of them.

    Attributes:
        tokens: `[samples, seq_len]`.
        teacher: outputs of the float model's final norm, `[samples, seq_len, hidden]` bfloat16.
    """

    tokens: Tensor
    teacher: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def take(self, index: Tensor | slice) -> Sequences:
        """Some of the samples."""
        return Sequences(self.tokens[index], self.teacher[index])

    def labels(self) -> Tensor:
        """The token after each, `[samples, seq_len]`; -1 after the last."""
        return torch.cat([self.tokens[:, 1:], torch.full_like(self.tokens[:, :1], -1)], 1)


@dataclass(frozen=True)
class TuningResult:
    """What the stage found.

    Attributes:
        before: KL(float ‖ quantized) on the held-out sequences, nats.
        after: the same of the best parameters, which are the ones that stay.
        steps: taken, stopped early or not.
    """

    before: float
    after: float
    steps: int


def tune(
    runner: BlockRunner,
    parameters: Parameters,
    heads: Heads,
    train: Sequences,
    held_out: Sequences,
    progress: Progress,
    options: TuningOptions | None = None,
    store: ProgressStore = NOWHERE,
) -> TuningResult:
    """Learn `parameters` of the model that `runner` runs inside of a `student.learning` context.

    Args:
        runner: of the quantized model.
        parameters: changed in place; the best ones on `held_out`, which may be those given.
        heads: both lm_heads.
        train: sequences to learn from, all of one length.
        held_out: sequences to judge by.
        progress: shows a stage with a step for each batch.
        options: of the stage.
        store: has the state of a stage that was ended, and gets that of this one at every look at the held-out tokens.
    """
    options = options or TuningOptions()
    judge = _Judge(runner, heads, held_out)
    batches = list(_batches(len(train), options))
    every = max(1, len(batches) // _CHECKS)
    optimizer = torch.optim.AdamW(list(parameters), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate_of(len(batches)))
    state = TuningState(parameters, optimizer, schedule)
    if not state.load(store):
        state.start(judge())
    with progress.stage("learn scales", total=len(batches)) as stage:
        stage.advance(state.steps)
        for index, batch in enumerate(batches[state.steps :], state.steps):
            if state.misses >= options.patience:
                break
            _step(runner, parameters, heads, train.take(batch), options.loss, optimizer)
            schedule.step()
            return_freed_memory()  # pieces between what stays would add 0.2 GB in 80 steps of SmolLM2-135M
            stage.advance()
            state.steps += 1
            if (index + 1) % every and index + 1 < len(batches):
                continue
            found = judge()
            logger.info("learned scales: step %d of %d, held-out loss %.4f", index + 1, len(batches), found)
            state.judge(found)
            state.save(store)
    parameters.set_values(state.kept)
    return TuningResult(state.before, state.best, state.steps)


def teacher_states(runner: BlockRunner) -> Tensor:
    """Outputs of the final norm `[samples, seq_len, hidden]` bfloat16 of the float model that `runner` runs."""
    hidden = runner.embedded()
    for layer in range(len(runner.blocks)):
        hidden = runner.run(layer, hidden)
    norm, _ = runner.ends()
    with torch.inference_mode():
        result: Tensor = norm(hidden).bfloat16()
    return result.clone()


def _step(
    runner: BlockRunner,
    parameters: Parameters,
    heads: Heads,
    batch: Sequences,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
) -> None:
    mine = batch.take(slice(parallel.rank(), None, parallel.size()))
    if len(mine):
        hidden = runner.differentiable(mine.tokens, checkpointed)
        found = heads.loss(loss, hidden.flatten(0, 1), mine.teacher.flatten(0, 1), mine.labels().flatten())
        found.backward()  # type: ignore[no-untyped-call]
    parallel.average_gradients(parameters, len(mine))
    torch.nn.utils.clip_grad_norm_(list(parameters), _LARGEST_GRADIENT, foreach=False)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    parameters.clamp_clips()


def checkpointed(block: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`block(hidden)` whose inside is computed again for the gradient: memory of one block, not of all."""
    result: Tensor = checkpoint(block, hidden, use_reentrant=False)
    return result


class _Judge:
    def __init__(self, runner: BlockRunner, heads: Heads, sequences: Sequences) -> None:
        self._runner, self._heads, self._sequences = runner, heads, sequences

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean KL(float ‖ quantized) of the next-token distributions, nats."""
        total = 0.0
        for index in range(parallel.rank(), len(self._sequences), parallel.size()):
            one = self._sequences.take(slice(index, index + 1))
            hidden = self._runner.differentiable(one.tokens)
            rows = hidden.flatten(0, 1)
            total += float(self._heads.loss(Loss(), rows, one.teacher.flatten(0, 1), one.labels().flatten()))
        return parallel.total(total)[0] / len(self._sequences)


def _batches(count: int, options: TuningOptions) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        yield from torch.split(torch.randperm(count, generator=generator), options.batch)


def _rate_of(steps: int) -> Callable[[int], float]:
    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(1, steps))))
        return min(1.0, (step + 1) / _WARM_UP) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)

    return rate
