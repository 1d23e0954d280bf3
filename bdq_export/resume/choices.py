"""Records of the two choices that come before rounding: the transform, and the bits of each site."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from bdq_export.calibration.bit_choice import ChosenBits
from bdq_export.calibration.candidates import Energies
from bdq_export.calibration.selection import Measured
from bdq_export.report.report import BitChoice, SiteBits
from bdq_export.resume.codecs import transforms_from, transforms_record
from bdq_export.resume.record import Record, merged
from bdq_export.transform import Transforms


@dataclass(frozen=True, eq=False)
class ChosenTransform:
    """A transform and how it was chosen.

    Attributes:
        name: of the candidate.
        reason: why.
        measured: the losses of all candidates.
        transforms: of the chosen one.
        energies: of its linears' inputs.
    """

    name: str
    reason: str
    measured: tuple[Measured, ...]
    transforms: Transforms
    energies: Energies

    def record(self) -> Record:
        """For a store."""
        losses = [[each.name, each.loss] for each in self.measured]
        values = {"name": self.name, "reason": self.reason, "measured": losses, "energies": list(self.energies)}
        tensors: dict[str, Tensor] = dict(self.energies)
        return merged({"choice": Record(values, tensors), "transforms": transforms_record(self.transforms)})

    @classmethod
    def of(cls, record: Record) -> ChosenTransform:
        """What was recorded.

        Raises:
            ValueError, KeyError, TypeError: the record is another one.
        """
        choice, values = record.part("choice"), record.part("choice").values
        return cls(
            values["name"],
            values["reason"],
            tuple(Measured(name, loss) for name, loss in values["measured"]),
            transforms_from(record.part("transforms")),
            {path: choice.tensors[path] for path in values["energies"]},
        )


def bits_record(chosen: ChosenBits) -> Record:
    """The record of chosen bits."""
    choice = asdict(chosen.choice)
    for site in choice["sites"]:
        site["losses"] = list(site["losses"].items())  # JSON has no numbers for keys
    return Record({"bits": dict(chosen.bits), "choice": choice})


def bits_from(record: Record) -> ChosenBits:
    """What `bits_record` recorded.

    Raises:
        ValueError, KeyError, TypeError: the record is another one.
    """
    choice = dict(record.values["choice"])
    sites = (
        {**site, "modules": tuple(site["modules"]), "losses": dict(site["losses"])} for site in choice.pop("sites")
    )
    return ChosenBits(record.values["bits"], BitChoice(**choice, sites=tuple(SiteBits(**site) for site in sites)))
