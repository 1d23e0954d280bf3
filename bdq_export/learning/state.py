"""A quantized model as calibration left it: what the learned stage starts from, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from bdq_runtime.packing import QuantizedWeight
from bdq_runtime.specs import ActivationQuantization, AnyKVQuantization, KVQuantization, OnlineTransform


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """Everything that a learned stage may change, and the weights around it.

    Attributes:
        weights: canonical folded float weights; learning changes gains of norms only.
        quantized: canonical weight name -> quantized weight; learning changes scales only, never codes.
        activations: canonical path of a linear -> quantization of its inputs; learning changes clips.
        online: canonical path of a linear -> what is applied to its inputs first; learning changes diagonals. Linears
            of one site share one object.
        kv: layer -> quantization of its cache; learning changes clips, and not static scales.
    """

    weights: Mapping[str, Tensor]
    quantized: Mapping[str, QuantizedWeight]
    activations: Mapping[str, ActivationQuantization] = field(default_factory=dict)
    online: Mapping[str, OnlineTransform] = field(default_factory=dict)
    kv: Mapping[int, AnyKVQuantization] = field(default_factory=dict)

    @property
    def dynamic_caches(self) -> dict[int, KVQuantization]:
        """Those of `kv` that have clips."""
        return {layer: cache for layer, cache in self.kv.items() if isinstance(cache, KVQuantization)}
