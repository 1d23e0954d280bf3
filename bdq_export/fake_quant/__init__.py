"""The torch model of what the `bdq` operators compute (docs/ops.md)."""

from __future__ import annotations

from bdq_export.fake_quant.activations import fake_quantize_tokens, quantize_tokens
from bdq_export.fake_quant.hadamard import apply_online, largest_size, online_hadamard
from bdq_export.fake_quant.kv_rows import fake_quantize_rows, quantize_rows
from bdq_export.fake_quant.model import FakeQuantization, attach, fake_quantized, transform_input

__all__ = [
    "FakeQuantization",
    "apply_online",
    "attach",
    "fake_quantize_rows",
    "fake_quantize_tokens",
    "fake_quantized",
    "largest_size",
    "online_hadamard",
    "quantize_rows",
    "quantize_tokens",
    "transform_input",
]
