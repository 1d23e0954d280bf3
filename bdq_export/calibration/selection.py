"""Which transform an export uses: candidates are quantized cheaply and measured on held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from bdq_export.calibration.candidates import (
    ROTATED,
    Energies,
    Statistics,
    closed_form_diagonals,
    rotations,
    scaled_energies,
    smooth_diagonals,
)
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.workspace import Workspace
from bdq_export.transform import Transforms, fold

NONE = "none"
UNTYING_GAIN = 0.1
"""Share of the loss that a rotation must take off where it unties embeddings, which costs one more table of bytes."""
_TRIED = {
    "none": ("none",),
    "smooth": ("smooth",),
    "hadamard": ("hadamard",),
    "bdq": ("bdq", "bdq-rotated"),
    "auto": ("none", "smooth", "bdq", "bdq-rotated"),
}


@dataclass(frozen=True, eq=False)
class Transformed:
    """A model after one candidate's transforms.

    Attributes:
        name: of the candidate.
        transforms: what was folded.
        weights: the folded weights.
        energies: E[x²] of every linear's inputs.
    """

    name: str
    transforms: Transforms
    weights: Mapping[str, Tensor]
    energies: Energies


@dataclass(frozen=True)
class Measured:
    """The held-out loss of one candidate, rounded to nearest."""

    name: str
    loss: float


def names_to_try(transform: str, rotates: bool, weight_only: bool) -> tuple[str, ...]:
    """The candidates behind the option `transform`.

    A rotation is only tried by itself where it can pay: on families whose norms commute with it, and where activations
    are quantized. It mixes what blocks of weights keep apart (SmolLM2-135M at w4a16, block 32: 0.43 nats from the
    float model against 0.19 without a transform), and it unties embeddings.

    Args:
        transform: the option.
        rotates: the family has a residual rotation.
        weight_only: activations stay float.
    """
    names = _TRIED[transform]
    if len(names) == 1 or (rotates and not weight_only):
        return names
    return tuple(name for name in names if name not in ROTATED)


def transformed(space: Workspace, name: str, statistics: Statistics, seed: int) -> Transformed:
    """Fold candidate `name`; `statistics` are those of the untransformed model."""
    architecture, dimensions = space.architecture, space.dimensions
    transforms, weights = Transforms(), space.weights
    if name in ROTATED:
        transforms = rotations(architecture, dimensions, seed)
        weights = fold(architecture, dimensions, space.weights, transforms)
        space.install(weights)
        statistics = space.statistics()
    diagonals = {}
    if name == "smooth":
        diagonals = smooth_diagonals(architecture, dimensions, weights, statistics)
    elif name in ("bdq", "bdq-rotated"):
        diagonals = closed_form_diagonals(architecture, dimensions, weights, statistics)
    if diagonals:
        transforms = Transforms(
            diagonals, residual_rotation=transforms.residual_rotation, head_rotations=transforms.head_rotations
        )
        weights = fold(architecture, dimensions, space.weights, transforms)
    energies = scaled_energies(architecture, dimensions, statistics, diagonals)
    return Transformed(name, transforms, weights, energies)


def measure_rounded(space: Workspace, candidate: Transformed, loss: HeldOutLoss) -> Measured:
    """Round `candidate` to nearest and measure it; the float model is back afterwards."""
    space.install(candidate.weights)
    space.set_quantized(space.round_linears(candidate.weights, candidate.energies))
    measured = Measured(candidate.name, space.measure(loss))
    # Back at once: the next candidate is folded while nothing but the float weights is held.
    space.install(space.weights)
    return measured


def choose(measured: list[Measured], tied: bool) -> tuple[str, str]:
    """The name of the best candidate, and why.

    The least loss wins; a rotation that unties embeddings must win clearly, see `UNTYING_GAIN`.
    """
    ranked = sorted(measured, key=lambda candidate: candidate.loss)
    best = ranked[0]
    if not (tied and best.name in ROTATED) or len(ranked) == 1:
        return best.name, f"{best.name} has the least held-out loss, {best.loss:.4f} nats"
    plain = next((candidate for candidate in ranked if candidate.name not in ROTATED), None)
    if plain is None or best.loss < plain.loss * (1 - UNTYING_GAIN):
        return best.name, (
            f"{best.name} has the least held-out loss, {best.loss:.4f} nats, clearly less than without a rotation; "
            "it unties embedding and lm_head, which are both stored"
        )
    return plain.name, (
        f"{plain.name} has a held-out loss of {plain.loss:.4f} nats; {best.name} has {best.loss:.4f}, not enough less "
        "to store embedding and lm_head apart"
    )
