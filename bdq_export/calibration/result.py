"""What a calibration found: everything that the rest of an export needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bdq_export.calibration.learned_scales import LearnedScales
from bdq_export.calibration.ranges import Range
from bdq_export.report.report import BitChoice, Candidate, SiteFlatness
from bdq_export.transform import Transforms
from bdq_runtime.packing import QuantizedWeight
from bdq_runtime.specs import ActivationQuantization, AnyKVQuantization, OnlineTransform


@dataclass(frozen=True, eq=False)
class CalibrationResult:
    """What calibration found.

    Attributes:
        transform: name of the chosen candidate.
        reason: why it was chosen.
        transforms: what was folded.
        weights: the folded canonical float weights.
        quantized: canonical weight name -> quantized weight, embedding and lm_head included; the rest stays float.
        activation_ranges: canonical path -> static range, for integer operators; else empty.
        activations: canonical path of each linear (and lm_head) -> its dynamic activation quantization; empty for a16.
        online: canonical path of each linear -> what is applied to its input first; the linears of one site share one.
        kv: layer -> quantization of its cache; empty for kv16.
        held_back: tokens `[samples, seq_len]` that nothing was fitted to.
        candidates: the held-out loss of each transform tried (nats, rounded to nearest), and of the final weights.
        loss: held-out loss of the chosen quantized weights, or None where nothing was measured.
        activation_flatness: of every site's inputs.
        weight_flatness: of every site's weights.
        bits: what `target_bits` came to, or None.
        learned: what the end-to-end stage did; None where there was none.
        warnings: what may go wrong.
    """

    transform: str
    reason: str
    transforms: Transforms
    weights: Mapping[str, Tensor]
    quantized: Mapping[str, QuantizedWeight]
    held_back: Tensor
    activation_ranges: Mapping[str, Range] = field(default_factory=dict)
    activations: Mapping[str, ActivationQuantization] = field(default_factory=dict)
    online: Mapping[str, OnlineTransform] = field(default_factory=dict)
    kv: Mapping[int, AnyKVQuantization] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()
    loss: float | None = None
    activation_flatness: tuple[SiteFlatness, ...] = ()
    weight_flatness: tuple[SiteFlatness, ...] = ()
    bits: BitChoice | None = None
    learned: LearnedScales | None = None
    warnings: tuple[str, ...] = ()
