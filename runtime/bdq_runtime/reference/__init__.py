"""The `bdq` operators in NumPy, line by line as docs/ops.md states them: what kernels and function bodies must equal.

Lines that the page marks exact are float32 operations, one at a time; sums whose order is free are float64. Nothing
here is fast, and nothing imports onnx but `onnx_operators`.
"""

from bdq_runtime.reference.activations import dynamic_fake_quantize, quantize_activations
from bdq_runtime.reference.attention import AttentionOutputs, kv_attention
from bdq_runtime.reference.cache_rows import dequantize_cache_rows, quantize_cache_rows
from bdq_runtime.reference.hadamard import hadamard
from bdq_runtime.reference.linear import low_bit_linear
from bdq_runtime.reference.rotary import rotate_halves

__all__ = [
    "AttentionOutputs",
    "dequantize_cache_rows",
    "dynamic_fake_quantize",
    "hadamard",
    "kv_attention",
    "low_bit_linear",
    "quantize_activations",
    "quantize_cache_rows",
    "rotate_halves",
]
