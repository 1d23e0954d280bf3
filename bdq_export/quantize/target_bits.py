"""What `target_bits` may choose: the groups of linears that get one bit width each, and the widths there are.

The average counts the codes of the weights of the decoder blocks' linears, the number that `w4` of a scheme names: not
their scales and zero points, which the block size decides, nor embedding and lm_head. A module that `keep` fixes counts
with its bits, 16 where it stays float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from bdq_export.calibration.sites import Site, block_sites
from bdq_export.errors import UsageError
from bdq_export.options import BDQ, ExportOptions
from bdq_export.scheme import QuantScheme
from bdq_models import Architecture, Dimensions

GRADIENT_TOKENS = 2048
"""Calibration tokens that sensitivities are measured on."""


@dataclass(frozen=True)
class BitGroup:
    """Linears of one site whose bits are chosen together, so that they can be one node of the graph.

    Attributes:
        site: what they read.
        paths: canonical absolute paths of those that `keep` does not fix.
        weights: how many values they have.
    """

    site: Site
    paths: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class BitBudget:
    """What there is to choose.

    Attributes:
        groups: in execution order.
        choices: bits that a group can have, ascending.
        kept: canonical path -> bits that `keep` asks for.
        kept_bits: of all kept modules together.
        total: values of all linears of the decoder blocks, kept ones included.
    """

    groups: tuple[BitGroup, ...]
    choices: tuple[int, ...]
    kept: Mapping[str, int]
    kept_bits: int
    total: int

    @property
    def least(self) -> float:
        """The smallest average."""
        return self._average(self.choices[0])

    @property
    def most(self) -> float:
        """The largest average."""
        return self._average(self.choices[-1])

    def left(self, target: float) -> int:
        """Bits for all groups together at an average of `target`."""
        # A hair more, so that 3.1 of a million weights is not 3099999.
        return int(target * self.total * (1 + 1e-12) + 1e-6) - self.kept_bits

    def _average(self, bits: int) -> float:
        return (self.kept_bits + bits * sum(group.weights for group in self.groups)) / self.total


def bit_choices(options: ExportOptions) -> tuple[int, ...]:
    """Bits that the operators of an export have: 3 are bdq's only, and 8 need int8 activations in MatMulNBits."""
    if options.linear_ops == BDQ:
        return (2, 3, 4, 8)
    return (2, 4, 8) if options.accuracy_level == 4 else (2, 4)


def least_scheme(options: ExportOptions) -> QuantScheme:
    """The scheme, with no more weight bits than are asked for on average: what may be expected of the result."""
    scheme = QuantScheme.parse(options.scheme)
    if options.target_bits is None:
        return scheme
    return replace(scheme, weight_bits=max(bits for bits in (2, 3, 4, 8) if bits <= options.target_bits))


def bit_budget(options: ExportOptions, architecture: Architecture, dimensions: Dimensions) -> BitBudget:
    """The groups of a model and what `keep` takes away from them."""
    groups: list[BitGroup] = []
    kept: dict[str, int] = {}
    kept_bits = total = 0
    for layer in range(dimensions.layers):
        sizes = {
            architecture.layer_path(layer, path): dimensions.output_size(path) * dimensions.input_size(path)
            for path in architecture.linears
        }
        total += sum(sizes.values())
        for site in block_sites(architecture, dimensions, layer):
            fixed = {path: bits for path in site.paths if (bits := options.bits_of(path)) is not None}
            kept |= fixed
            kept_bits += sum(sizes[path] * bits for path, bits in fixed.items())
            free = tuple(path for path in site.paths if path not in fixed)
            if free:
                groups.append(BitGroup(site, free, sum(sizes[path] for path in free)))
    return BitBudget(tuple(groups), bit_choices(options), kept, kept_bits, total)


def check_target(options: ExportOptions, architecture: Architecture, dimensions: Dimensions) -> None:
    """Refuse a `target_bits` that this model cannot have with these operators and `keep` patterns.

    Raises:
        UsageError: such a target.
    """
    target = options.target_bits
    if target is None:
        return
    budget = bit_budget(options, architecture, dimensions)
    if not budget.groups:
        raise UsageError("--target-bits has nothing to choose: --keep fixes every linear; leave one of them out")
    if budget.left(target) < budget.choices[0] * sum(group.weights for group in budget.groups) or target > budget.most:
        kept = f", with {len(budget.kept)} linears fixed by --keep" if budget.kept else ""
        raise UsageError(
            f"--target-bits is {target:g}, but linears of {', '.join(map(str, budget.choices))} bits{kept} have "
            f"{budget.least:.4g} to {budget.most:.4g} on average; choose a target in between"
        )
