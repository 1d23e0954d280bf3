"""What a calibration may quantize besides weights, and what the torch model computes with at the moment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bdq_export.fake_quant import FakeQuantization
from bdq_export.options import ExportOptions
from bdq_export.scheme import FLOAT_BITS, QuantScheme
from bdq_runtime.specs import ActivationQuantization, AnyKVQuantization, KVQuantization, OnlineTransform

LM_HEAD_BITS = 8
"""Of the activations that lm_head reads: it reaches every logit directly."""
_FIRST_CLIPS = {3: 0.7, 4: 0.8, 8: 1.0}
"""Clips of activations before any were searched, to compare transforms."""


@dataclass(frozen=True)
class DynamicBits:
    """Bits of what is quantized when the model runs.

    Attributes:
        activations: of the inputs of the blocks' linears; None leaves them float.
        kv: of the cache; None leaves it float.
        static_cache: the cache has scales of channels that calibration fixes, and no others.
    """

    activations: int | None
    kv: int | None
    static_cache: bool = False

    @classmethod
    def of(cls, options: ExportOptions) -> DynamicBits | None:
        """What an export asks for; None where nothing is quantized when the model runs."""
        scheme = QuantScheme.parse(options.scheme)
        activations = scheme.activation_bits if options.is_per_token else None
        kv = None if scheme.kv_bits == FLOAT_BITS else scheme.kv_bits
        return None if activations is None and kv is None else cls(activations, kv, options.has_static_cache)

    def cache(self, rotate: bool) -> KVQuantization | None:
        """The quantization of a dynamic cache without clips; `rotate` asks for a Hadamard transform of its key heads.

        None where the cache is float, or static: no clips of heads are searched or learned there.
        """
        return None if self.kv is None or self.static_cache else KVQuantization(self.kv, self.kv, hadamard=rotate)

    @property
    def static_kv(self) -> int | None:
        """Bits of a static cache; None where there is none."""
        return self.kv if self.static_cache else None

    def first_activations(self) -> ActivationQuantization | None:
        """A quantization of activations that no search was made for."""
        if self.activations is None:
            return None
        return ActivationQuantization(self.activations, _FIRST_CLIPS[self.activations])


@dataclass
class MutableQuantization:
    """What a model computes with now; `view` is what `fake_quant.attach` reads."""

    activations: dict[str, ActivationQuantization] = field(default_factory=dict)
    online: dict[str, OnlineTransform] = field(default_factory=dict)
    kv: dict[int, AnyKVQuantization] = field(default_factory=dict)

    @property
    def view(self) -> FakeQuantization:
        """The same mappings, for readers."""
        return FakeQuantization(self.activations, self.online, self.kv)

    def reset(self, online: Mapping[str, OnlineTransform]) -> None:
        """Float activations and cache, after `online`."""
        self.activations.clear()
        self.kv.clear()
        self.online.clear()
        self.online.update(online)
