"""What a written model says of itself: its ONNX `metadata_props`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

PREFIX = "bdq."
PRODUCER = "bdq-export"


@dataclass(frozen=True)
class ModelMetadata:
    """The `metadata_props` of an exported model; each field is the key `bdq.<field>`.

    Attributes:
        version: of bdq-export.
        scheme: bits, for example "w4a16".
        seed: of every random choice.
        source_hash: of the checkpoint (see `Checkpoint.source_hash`).
        executed_precision: what the kernels really compute in, for example "int8 activations (accuracy_level 4)".
        transform: the transform that was chosen.
        family: `Architecture.name`.
        average_bits: of the codes of the decoder blocks' weights, where `target_bits` chose them. None is not written.
        operators_version: of the `bdq` operators, for a model that uses them: an op library must have this version or
            a newer one. None is not written.
    """

    version: str
    scheme: str
    seed: int
    source_hash: str
    executed_precision: str
    transform: str
    family: str
    average_bits: float | None = None
    operators_version: int | None = None

    def write(self, model: ir.Model) -> None:
        """Put the values into `model`, with this tool as its producer."""
        for key, value in asdict(self).items():
            if value is not None:
                model.metadata_props[PREFIX + key] = str(value)
        model.producer_name = PRODUCER
        model.producer_version = self.version


def read_metadata(properties: dict[str, str]) -> dict[str, str]:
    """The project's own entries of a model's metadata, without the prefix."""
    return {key.removeprefix(PREFIX): value for key, value in properties.items() if key.startswith(PREFIX)}
