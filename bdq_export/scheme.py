"""The name of a scheme: `w<bits>a<bits>[kv<bits>]`, 16 meaning float."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bdq_export.errors import UsageError

FLOAT_BITS = 16
_WEIGHT_BITS = (2, 3, 4, 8, 16)
_ACTIVATION_BITS = (3, 4, 8, 16)
_PATTERN = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?")


@dataclass(frozen=True)
class QuantScheme:
    """Bits of weights, activations and KV cache; `parse(str(scheme)) == scheme`.

    Attributes:
        weight_bits: 2, 3, 4, 8 or 16.
        activation_bits: 3, 4, 8 or 16.
        kv_bits: 3, 4, 8 or 16.
    """

    weight_bits: int
    activation_bits: int
    kv_bits: int = FLOAT_BITS

    def __str__(self) -> str:
        kv = "" if self.kv_bits == FLOAT_BITS else f"kv{self.kv_bits}"
        return f"w{self.weight_bits}a{self.activation_bits}{kv}"

    @property
    def weight_only(self) -> bool:
        """True when activations and KV cache stay float."""
        return self.activation_bits == FLOAT_BITS and self.kv_bits == FLOAT_BITS

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        """The scheme that `text` names.

        Raises:
            UsageError: `text` is not of the grammar, or a bit width is not supported.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise UsageError(
                f"scheme {text!r} is not of the form w<bits>a<bits>[kv<bits>]; write for example w4a16 or w4a4kv4"
            )
        weight, activation, kv = (int(group) if group else FLOAT_BITS for group in match.groups())
        for name, bits, allowed in (
            ("weight", weight, _WEIGHT_BITS),
            ("activation", activation, _ACTIVATION_BITS),
            ("KV cache", kv, _ACTIVATION_BITS),
        ):
            if bits not in allowed:
                raise UsageError(
                    f"scheme {text!r}: {name} bits are {bits}, expected one of {', '.join(map(str, allowed))}"
                )
        return cls(weight, activation, kv)
