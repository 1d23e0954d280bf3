"""The stage that learns rotations inside of a calibration: what it starts from, and what becomes of it."""

from __future__ import annotations

import logging
from dataclasses import replace

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.dynamic import LM_HEAD_BITS
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.precision import product_dtype
from bdq_export.calibration.workspace import Workspace
from bdq_export.learning.rotation_stage import RotationOptions, RotationResult, learn
from bdq_export.learning.rotation_student import RotationStudent
from bdq_export.learning.rotations import Rotations
from bdq_export.process_memory import give_back_memory
from bdq_export.streamed_blocks import held
from bdq_export.transform import Transforms
from bdq_runtime.specs import ActivationQuantization

logger = logging.getLogger(__name__)


def learn_rotations(
    space: Workspace, start: Transforms, loss: HeldOutLoss, options: RotationOptions
) -> tuple[Transforms, RotationResult]:
    """`start` with learned R1 and R2, and what that brought; the model computes as before afterwards.

    Args:
        space: computes with the untransformed float weights, and quantizes activations.
        start: random R1 and R2, and the online rotations, of "hadamard".
        loss: judges the rotations, with float weights.
        options: of the stage.
    """
    dynamic, residual = space.dynamic, start.residual_rotation
    assert dynamic is not None, "refused without quantized activations"
    assert residual is not None, "refused where norms do not commute with it"
    rotations = Rotations(residual, start.head_rotations)
    student = RotationStudent(
        space.architecture,
        space.dimensions,
        start,
        rotations,
        dynamic.first_activations(),
        None if dynamic.activations is None else ActivationQuantization(LM_HEAD_BITS),
        dynamic.cache(space.rotated_cache(True)),
    )
    # `learn` computes in bfloat16 by itself: the runner's own way has no gradients.
    runner = BlockRunner(space.model, space.architecture.layers, space.tokens, fast=False)
    head = space.model.get_submodule(space.architecture.lm_head).get_parameter("weight").detach().to(product_dtype())
    with held(space.model), student.attached(space.model):
        # Each process has its part of the tokens; batches are drawn from all.
        result = learn(runner, rotations, head, parallel.unshard(space.tokens), loss, space.progress, options)
    give_back_memory()
    logger.info("learned rotations: held-out loss %.4f, %.4f before", result.after, result.before)
    first, heads = rotations.exact()
    return replace(start, residual_rotation=first, head_rotations=heads), result
