"""The end-to-end stage inside of a calibration: what it starts from, and whether its result is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.precision import product_dtype
from bdq_export.calibration.selection import Transformed
from bdq_export.calibration.workspace import Workspace
from bdq_export.float_model import load_float_model
from bdq_export.learning.end_to_end import Sequences, TuningOptions, teacher_states, tune
from bdq_export.learning.heads import Heads
from bdq_export.learning.losses import Loss
from bdq_export.learning.parameters import all_sites, initial_parameters, learned_state, modules_of
from bdq_export.learning.state import QuantizedModel
from bdq_export.learning.student import learning
from bdq_export.options import ExportOptions
from bdq_export.process_memory import give_back_memory
from bdq_export.quantize.sequential import kept
from bdq_export.resume import NOWHERE, ProgressStore
from bdq_export.streamed_blocks import held, streamed
from bdq_runtime.packing import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_EPOCHS = {"standard": 2, "best": 3}
_RATE, _SMALL_RATE = 3e-3, 5e-4
"""Where there is much to gain, and where there is little: after 30 steps of w4a16 (blocks of 128) the larger rate had
made 0.0962 nats 0.1010, the smaller one 0.1037 nats 0.0994."""


@dataclass(frozen=True)
class LearnedScales:
    """What the stage did.

    Attributes:
        before: held-out loss before it, nats.
        after: held-out loss of what was learned; what it started from is kept where that is not less.
        steps: of the optimizer.
    """

    before: float
    after: float
    steps: int

    @property
    def kept(self) -> bool:
        """Whether the export uses what was learned."""
        return self.after < self.before


def tuning_options(options: ExportOptions) -> TuningOptions:
    """How the stage runs for an export."""
    loss = Loss(options.loss, options.loss_delta, options.loss_target)
    rate = _RATE if options.rounds_coarsely else _SMALL_RATE
    return TuningOptions(epochs=_EPOCHS[options.effort], rate=rate, loss=loss, seed=options.seed)


def learn_scales(
    space: Workspace,
    candidate: Transformed,
    quantized: Mapping[str, QuantizedWeight],
    loss: HeldOutLoss,
    before: float,
    held_out: Tensor,
    options: TuningOptions,
    store: ProgressStore = NOWHERE,
) -> tuple[Transformed, Mapping[str, QuantizedWeight], LearnedScales]:
    """Learn scales around the codes of `quantized`; the model computes with what is returned afterwards.

    Args:
        space: computes with `candidate` and `quantized`.
        candidate: the transformed model.
        quantized: its weights.
        loss: judges the result as it will be stored.
        before: `loss` of what the model computes now.
        held_out: tokens of `loss`, for stopping early.
        options: of the stage.
        store: has the state of a stage that was ended, and gets that of this one.
    """
    start = QuantizedModel(
        candidate.weights,
        quantized,
        dict(space.quantization.activations),
        candidate.online,
        dict(space.quantization.kv),
    )
    heads, train, judged = _teacher(space, held_out)
    parameters = initial_parameters(space.architecture, space.dimensions, start)
    space.quantization.reset({})  # the student quantizes by itself
    runner = BlockRunner(space.model, space.architecture.layers, space.tokens, fast=False)
    with _without_linears(space), learning(space.model, space.architecture, space.dimensions, start, parameters):
        give_back_memory()
        result = tune(runner, parameters, heads, train, judged, space.progress, options, store)
    found = learned_state(space.architecture, space.dimensions, start, parameters)
    found = replace(found, quantized=kept(candidate.weights, found.quantized))
    give_back_memory()
    _compute_with(space, found)
    learned = LearnedScales(before, space.measure(loss), result.steps)
    logger.info("learned scales: held-out loss %.4f, %.4f before", learned.after, before)
    if not learned.kept:
        _compute_with(space, start)
        return candidate, quantized, learned
    return replace(candidate, weights=found.weights, online=found.online), found.quantized, learned


def _teacher(space: Workspace, held_out: Tensor) -> tuple[Heads, Sequences, Sequences]:
    """Both lm_heads, and what the float model makes of calibration and held-out tokens."""
    layers = space.architecture.layers
    twin = load_float_model(space.description, space.weights)

    def seen(tokens: Tensor) -> Sequences:
        return Sequences(tokens, teacher_states(BlockRunner(twin, layers, tokens)))

    def head(model: PreTrainedModel) -> Tensor:
        return model.get_submodule(space.architecture.lm_head).get_parameter("weight").detach().to(product_dtype())

    # Each process runs its part; batches are drawn from all.
    own = seen(space.tokens)
    train = Sequences(parallel.unshard(own.tokens), parallel.unshard(own.teacher))
    return Heads(head(space.model), head(twin)), train, seen(held_out)


@contextmanager
def _without_linears(space: Workspace) -> Iterator[None]:
    """While the context is open, the model has everything but its blocks' linears: the student has their codes.

    Afterwards it has to be given weights.
    """
    if streamed(space.model) is None:
        for site in all_sites(space.architecture, space.dimensions):
            for name in modules_of(space.architecture, space.dimensions, site):
                weight = space.model.get_submodule(name).get_parameter("weight")
                weight.data = weight.new_zeros(()).expand(weight.shape)
    # Norms and biases of all blocks are a few numbers a row: read once, and no block is folded again in each forward.
    with held(space.model, without=[f"{path}.weight" for path in space.linears()]):
        yield


def _compute_with(space: Workspace, state: QuantizedModel) -> None:
    space.install(state.weights, state.online)
    space.set_quantized(state.quantized)
    space.quantization.activations.update(state.activations)
    space.quantization.kv.update(state.kv)
