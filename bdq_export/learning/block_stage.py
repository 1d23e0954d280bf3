"""The stage before rounding, one block at a time: diagonals around the rotations and clips, against the float block.

The block's inputs are those that the already quantized blocks before it produce; its outputs are compared with what the
float blocks give for the float inputs. Weights are rounded to nearest in here; GPTQ rounds them for good afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.learning.block_parameters import BlockParameters
from bdq_export.learning.block_student import BlockStudent
from bdq_export.learning.weight_rounding import relative_error, total_error

_CHECKS = 4
_LAST_RATE = 0.05
_LARGEST_GRADIENT = 1.0
_FLATQUANT_STEPS = 64


@dataclass(frozen=True)
class BlockOptions:
    """How the stage runs.

    Attributes:
        steps: of the optimizer, for each block.
        batch: sequences a step.
        rate: learning rate of logarithms and clips.
        held_out: sequences that judge and are not learned from.
        seed: of the order of sequences.
        error: of the block's outputs `[batch, seq_len, hidden_size]` against those expected, `[]`.
    """

    steps: int = 32
    batch: int = 2
    rate: float = 5e-3
    held_out: int = 4
    seed: int = 0
    error: Callable[[Tensor, Tensor], Tensor] = relative_error


def flatquant_options(seed: int) -> BlockOptions:
    """As FlatQuant trains (5e-3, mean squared error), in fewer steps than its 15 epochs."""
    return BlockOptions(steps=_FLATQUANT_STEPS, seed=seed, error=total_error)


@dataclass(frozen=True)
class BlockResult:
    """Error of the block's outputs on held-out sequences, relative to their size.

    Attributes:
        before: with the transforms as they were.
        after: with the best that was found, which is never more.
    """

    before: float
    after: float


def learn_block(
    runner: BlockRunner, student: BlockStudent, hidden: Tensor, expected: Tensor, options: BlockOptions | None = None
) -> BlockResult:
    """Learn the parameters of `student` in place; the best ones on held-out sequences stay.

    A single sequence is learned from and judges, too.

    Args:
        runner: of the model whose block it is.
        student: over the parameters.
        hidden: inputs of the block from the quantized blocks before, `[samples, seq_len, hidden_size]`.
        expected: outputs of the float block for float inputs, of the same shape.
        options: of the stage.
    """
    options = options or BlockOptions()
    count = round(parallel.total(len(hidden))[0])
    held = min(options.held_out, max(1, count // 4))
    learned = max(1, count - held)
    judges = parallel.own(torch.arange(count - held, count))
    parameters: BlockParameters = student.parameters
    groups = parameters.groups(options.rate)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    rates = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(options.seed + student.layer)
    every = max(1, options.steps // _CHECKS)
    with student.attached(runner.model):
        before = best = _error(runner, student, hidden[judges], expected[judges], options)
        kept = parameters.values()
        for step in range(options.steps):
            part = max(_LAST_RATE, 0.5 * (1 + math.cos(math.pi * step / options.steps)))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * part
            index = parallel.own(torch.randint(learned, (options.batch,), generator=generator))
            student.refresh()
            if len(index):
                found = runner.block(student.layer, hidden[index])
                options.error(found, expected[index]).backward()  # type: ignore[no-untyped-call]
            parallel.average_gradients(parameters, len(index))
            torch.nn.utils.clip_grad_norm_(list(parameters), _LARGEST_GRADIENT, foreach=False)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            parameters.clamp_clips()
            if (step + 1) % every == 0 or step + 1 == options.steps:
                error = _error(runner, student, hidden[judges], expected[judges], options)
                if error < best and parameters.well_conditioned():
                    best, kept = error, parameters.values()
        parameters.set_values(kept)
    return BlockResult(before, best)


@torch.no_grad()
def _error(
    runner: BlockRunner, student: BlockStudent, hidden: Tensor, expected: Tensor, options: BlockOptions
) -> float:
    student.refresh()
    errors = [
        float(options.error(runner.block(student.layer, one), target))
        for one, target in zip(torch.split(hidden, 1), torch.split(expected, 1), strict=True)
    ]
    return parallel.mean(sum(errors), len(errors))
