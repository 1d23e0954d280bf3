"""bfloat16 where the processor multiplies it in hardware: calibration needs the model's inputs, not their last bits."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def has_fast_bfloat16() -> bool:
    """Whether this processor has bfloat16 matrix instructions (AMX, AVX-512 BF16 or Arm's)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fast_matmuls(enabled: bool = True) -> AbstractContextManager[object]:
    """Matrix products in bfloat16 where that is fast, everything else in float32; a null context elsewhere."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and has_fast_bfloat16())


def product_dtype() -> torch.dtype:
    """What operands of large products are kept in: bfloat16 where the processor multiplies it, else float32."""
    return torch.bfloat16 if has_fast_bfloat16() else torch.float32
