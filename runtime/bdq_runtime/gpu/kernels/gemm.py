"""Low-bit matmul on int8 tensor cores: weights unpacked in registers, activations from `quantize_rows`."""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.epilogue import store_outputs
from bdq_runtime.gpu.kernels.names import named
from bdq_runtime.gpu.kernels.panels import weight_tile


@triton.jit(repr=named("low_bit_gemm"))
def low_bit_gemm(
    q_ptr, scale_ptr, total_ptr, sums_ptr, weight_ptr, scales_ptr, bias_ptr, y_ptr,
    M, N, rows, padded, multiple, zero, blocks, log_block, gate, has_bias,
    BITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BLOCKED: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    """y `[M, N]`: a program makes BN rows of panels (`rows` in all) for BM tokens.

    A weight is `multiple * code - zero`; both go around the matmul: Σ q w = multiple Σ q code - zero Σ q, in int32.
    Weights are the left side of the matmul: tensor cores take that one from registers, where it was unpacked.
    """
    BK: tl.constexpr = 32 if BLOCKED else 64
    first = tl.program_id(1) * BN
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.minimum(m, M - 1)
    r = tl.minimum(first + tl.arange(0, BN), rows - 1)
    base = (r // 16).to(tl.int64) * (padded * (2 * BITS)) + (r % 16) * 4
    scale_row = (r // 16) * blocks * 16 + r % 16
    q_rows = q_ptr + token.to(tl.int64)[:, None] * padded + tl.arange(0, BK)[None, :]
    s = tl.load(scale_ptr + token)
    acc = tl.zeros((BN, BM), tl.int32)
    if BLOCKED:
        value = tl.zeros((BN, BM), tl.float32)
        offset = tl.zeros((BM,), tl.int32)
        steps = padded // 32
        for step in range(0, steps):
            w = weight_tile(weight_ptr, base, step, BITS, BN, BK, ASM)
            acc = tl.dot(w, tl.trans(tl.load(q_rows + step * BK)), acc, out_dtype=tl.int32)
            offset += tl.load(sums_ptr + token.to(tl.int64) * steps + step)
            block = (step * 32) >> log_block
            last = (((step + 1) * 32) >> log_block) != block
            if last | (step == steps - 1):
                scale = tl.load(scales_ptr + scale_row + tl.minimum(block, blocks - 1) * 16).to(tl.float32)
                value += (acc * multiple - (zero * offset)[None, :]).to(tl.float32) * scale[:, None]
                acc = tl.zeros((BN, BM), tl.int32)
                offset = tl.zeros((BM,), tl.int32)
        value = value * s[None, :]
    else:
        for step in range(0, padded // BK):
            w = weight_tile(weight_ptr, base, step, BITS, BN, BK, ASM)
            acc = tl.dot(w, tl.trans(tl.load(q_rows + step * BK)), acc, out_dtype=tl.int32)
        offset = zero * tl.load(total_ptr + token)
        scale = tl.load(scales_ptr + scale_row).to(tl.float32)
        value = ((acc * multiple - offset[None, :]).to(tl.float32) * s[None, :]) * scale[:, None]
    store_outputs(value, y_ptr, bias_ptr, first, m, M, N, gate, has_bias, BN, BM)
