"""What an export did and what it measured, as `bdq_report.json` and `report.html` show it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bdq_export.package.side_files import to_json
from bdq_export.progress import StageCost
from bdq_export.verify import Verification

FORMAT = 1
"""Version of the layout of `bdq_report.json`."""


@dataclass(frozen=True)
class Candidate:
    """One transform that was tried, with its calibration loss."""

    name: str
    loss: float
    chosen: bool


@dataclass(frozen=True)
class SiteFlatness:
    """Flatness of the activations or of the weights at one site before and after the transform; 0 is perfectly flat.

    Attributes:
        layer: decoder layer.
        site: name of the edge, for example "attention_input".
    """

    layer: int
    site: str
    before: float
    after: float


@dataclass(frozen=True)
class WeightError:
    """How far one quantized weight is from its float original.

    Attributes:
        module: module path, for example "model.layers.0.mlp.down_proj".
        bits: of its codes.
        sqnr_db: signal to quantization noise, 10·log10(Σw² / Σ(w - w')²); higher is better.
    """

    module: str
    bits: int
    sqnr_db: float


@dataclass(frozen=True)
class SiteBits:
    """How many bits the linears of one site got.

    Attributes:
        layer: decoder layer.
        site: module path of the first linear that reads the site's input.
        modules: the linears whose bits were chosen together.
        weights: how many values they have.
        bits: that were chosen.
        losses: bits -> predicted KL(float ‖ quantized), in nats, if only this site were rounded to so many.
    """

    layer: int
    site: str
    modules: tuple[str, ...]
    weights: int
    bits: int
    losses: Mapping[int, float]


@dataclass(frozen=True)
class BitChoice:
    """What `--target-bits` came to.

    Attributes:
        target: average bits that were asked for.
        average: of the codes of the decoder blocks' weights, `kept` ones included.
        sites: in execution order.
        kept: module -> bits that `--keep` fixed.
    """

    target: float
    average: float
    sites: tuple[SiteBits, ...]
    kept: Mapping[str, int] = field(default_factory=dict)

    @property
    def predicted_loss(self) -> float:
        """Sum of the predicted losses of all sites, in nats."""
        return sum(site.losses[site.bits] for site in self.sites)


@dataclass(frozen=True)
class ExportReport:
    """Everything worth knowing about one export.

    Attributes:
        version: of bdq-export.
        model: name of the source model, never its path.
        family: `Architecture.name`.
        scheme: bits.
        transform: the transform that was chosen.
        executed_precision: what the kernels really compute in.
        source_hash: of the checkpoint.
        options: every resolved option.
        parameters: number of weights, tied ones counted once.
        weight_bytes: bytes of all weights in the exported file, scales and zero points included.
        source_bytes: bytes of the checkpoint's weight files.
        files: bytes of each written file.
        stages: what each stage cost.
        candidates: transforms that were tried.
        flatness: of the activations, per layer and site.
        weight_flatness: of the weights, per layer and site.
        weight_errors: per quantized weight.
        bits: of each site, where they were chosen.
        verification: None when it was not run.
        notes: facts to know, for example that tied embeddings were untied.
        warnings: things that may go wrong.
        operators: names of the `bdq` operators in the model; empty for a model of stock operators.
        op_library: file name of the op library beside the model, None where there is none.
        op_library_platform: what that library is built for.
        versions: of the libraries that were used.
    """

    version: str
    model: str
    family: str
    scheme: str
    transform: str
    executed_precision: str
    source_hash: str
    options: Mapping[str, Any]
    parameters: int
    weight_bytes: int
    source_bytes: int
    files: Mapping[str, int] = field(default_factory=dict)
    stages: tuple[StageCost, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    flatness: tuple[SiteFlatness, ...] = ()
    weight_flatness: tuple[SiteFlatness, ...] = ()
    weight_errors: tuple[WeightError, ...] = ()
    bits: BitChoice | None = None
    verification: Verification | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    operators: tuple[str, ...] = ()
    op_library: str | None = None
    op_library_platform: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight takes on average, scales and zero points included."""
        return 8 * self.weight_bytes / self.parameters if self.parameters else 0.0

    @property
    def total_bytes(self) -> int:
        """Bytes of the model file and its data."""
        return sum(size for name, size in self.files.items() if name.endswith((".onnx", ".onnx.data")))

    @property
    def verified(self) -> bool:
        """Whether the exported file was compared with the float model and passed."""
        return self.verification is not None and self.verification.passed

    def to_json(self) -> bytes:
        """The content of `bdq_report.json`; numbers that are none become null."""
        body = {
            "format": FORMAT,
            "verified": self.verified,
            **{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)},
            "bits_per_weight": round(self.bits_per_weight, 4),
        }
        if self.verification is not None:
            body["verification"] = {**dataclasses.asdict(self.verification), "passed": self.verified}
        return to_json(_plain(body))


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
