"""Which transform an export uses: candidates are quantized cheaply and measured on held-out tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
from bdq_export.calibration.learned_rotations import learn_rotations
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.sandwich import ONLINE, PLAIN, sandwich
from bdq_export.calibration.workspace import Workspace
from bdq_export.learning.rotation_stage import RotationOptions
from bdq_export.options import KRONECKER, PARTIAL, SPIN
from bdq_export.transform import Transforms, fold, online_by_path
from bdq_runtime.specs import OnlineTransform

NONE = "none"
UNTYING_GAIN = 0.1
"""Share of the loss that a rotation must take off where it unties embeddings, which costs one more table of bytes."""
_FEW = 5
"""Bits of activations below which only rotations are tried beside no transform."""
_MILD = ("smooth", "bdq")
_TRIED = {
    "none": ("none",),
    "smooth": ("smooth",),
    "hadamard": ("hadamard",),
    SPIN: (SPIN,),
    "bdq": ("bdq", ONLINE, "bdq-rotated"),
    "auto": ("none", "smooth", "bdq", ONLINE, "bdq-rotated"),
    PLAIN: (PLAIN,),
    KRONECKER: (KRONECKER,),
    **{name: (name,) for name in PARTIAL},
}


@dataclass(frozen=True, eq=False)
class Transformed:
    """A model after one candidate's transforms.

    Attributes:
        name: of the candidate.
        transforms: what was folded.
        weights: the folded weights.
        energies: E[x²] of every linear's inputs.
        online: what each linear applies to its inputs, by canonical path.
        learned: what learning its rotations brought, in words; "" where none were learned.
    """

    name: str
    transforms: Transforms
    weights: Mapping[str, Tensor]
    energies: Energies
    online: Mapping[str, OnlineTransform] = field(default_factory=dict)
    learned: str = ""

    @property
    def rotates_heads(self) -> bool:
        """Whether keys are rotated before they are cached."""
        return self.name not in (NONE, "smooth", PLAIN)


@dataclass(frozen=True, eq=False)
class Measured:
    """A candidate without its weights, which are folded again if it is chosen.

    Attributes:
        name: of the candidate.
        loss: held-out loss, rounded to nearest.
        transforms: see `Transformed`.
        energies: see `Transformed`.
    """

    name: str
    loss: float
    transforms: Transforms = field(default_factory=Transforms)
    energies: Energies = field(default_factory=dict)


def names_to_try(transform: str, rotates: bool, activation_bits: int | None = None) -> tuple[str, ...]:
    """The candidates behind the option `transform`.

    A rotation is only tried by itself where it can pay: where activations are quantized, and on families whose norms
    commute with it unless rotations may run online. It mixes what blocks of weights keep apart (SmolLM2-135M at w4a16,
    block 32: 0.43 nats from the float model against 0.19 without a transform), and it unties embeddings.

    Args:
        transform: the option.
        rotates: inputs of linears can be rotated, and it may pay.
        activation_bits: of activations that are quantized when the model runs; None leaves them float.
    """
    names = _TRIED[transform]
    if len(names) == 1:
        return names
    if not rotates:
        return tuple(name for name in names if name not in (*ROTATED, ONLINE))
    if activation_bits is None:
        return tuple(name for name in names if name != ONLINE)
    # At few bits a diagonal alone is hopeless; R1 loses to rotations that run online at any (see `sandwich`).
    others = (*_MILD, "bdq-rotated") if activation_bits < _FEW else ("bdq-rotated",)
    return tuple(name for name in names if name not in others)


def transformed(
    space: Workspace, name: str, statistics: Statistics, seed: int, loss: HeldOutLoss | None = None
) -> Transformed:
    """Fold candidate `name`.

    Args:
        space: computes with the untransformed weights, before and after.
        name: of the candidate.
        statistics: of the untransformed model.
        seed: of every random choice.
        loss: judges rotations that are learned ("spin").
    """
    if space.dynamic is not None:
        return _transformed_dynamic(space, name, statistics, seed, loss)
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
    elif name in ("bdq", PLAIN, "bdq-rotated"):
        diagonals = closed_form_diagonals(architecture, dimensions, weights, statistics)
    if diagonals:
        transforms = replace(transforms, diagonals=diagonals)
        weights = fold(architecture, dimensions, space.weights, transforms)
    energies = scaled_energies(architecture, dimensions, statistics, diagonals)
    return Transformed(name, transforms, weights, energies)


def _transformed_dynamic(
    space: Workspace, name: str, statistics: Statistics, seed: int, loss: HeldOutLoss | None
) -> Transformed:
    transforms = sandwich(space, name, statistics, seed)
    learned = ""
    if name == SPIN:
        assert loss is not None, "what is learned is judged"
        transforms, result = learn_rotations(space, transforms, loss, RotationOptions(seed=seed))
        learned = (
            f"; learned rotations lose {result.after:.4f} nats on held-out tokens with float weights, "
            f"{result.before:.4f} before {result.steps} steps"
        )
    candidate = replace(refolded(space, name, transforms, {}), learned=learned)
    energies = {path: seen.energy for path, seen in statistics.items()}
    if name != NONE:
        space.install(candidate.weights, candidate.online)
        energies = {path: seen.energy for path, seen in space.statistics().items()}
        space.install(space.weights)
    return replace(candidate, energies=energies)


def refolded(space: Workspace, name: str, transforms: Transforms, energies: Energies) -> Transformed:
    """A candidate whose transforms and energies are known."""
    weights = fold(space.architecture, space.dimensions, space.weights, transforms)
    online = online_by_path(space.architecture, transforms)
    return Transformed(name, transforms, weights, energies, online)


def measure_rounded(space: Workspace, candidate: Transformed, loss: HeldOutLoss) -> Measured:
    """Round `candidate` to nearest and measure it; the float model is back afterwards."""
    space.install(candidate.weights, candidate.online)
    space.set_quantized(space.round_linears(candidate.weights, candidate.energies))
    if space.dynamic is not None:
        space.quantize_inputs(space.dynamic, candidate.rotates_heads)
    found = space.measure(loss)
    # Back at once: the next candidate is folded while nothing but the float weights is held.
    space.install(space.weights)
    return Measured(candidate.name, found, candidate.transforms, candidate.energies)


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
