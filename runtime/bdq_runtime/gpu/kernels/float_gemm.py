"""Low-bit weights, float activations: tf32 tensor cores, float32 accuracy, any number of bits in one image."""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.epilogue import store_outputs
from bdq_runtime.gpu.kernels.names import named


@triton.jit(repr=named("float_gemm"))
def float_gemm(
    x_ptr, weight_ptr, scales_ptr, bias_ptr, y_ptr,
    M, N, rows, K, padded, bits, multiple, zero, blocks, log_block, gate, has_bias,
    BN: tl.constexpr, BM: tl.constexpr
):  # fmt: skip
    """y `[M, N]` of x `[M, K]`. A weight less its scale has at most 8 bits, exact in tf32; x goes as a sum of two."""
    first = tl.program_id(1) * BN
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.minimum(m, M - 1)
    r = tl.minimum(first + tl.arange(0, BN), rows - 1)
    base = (r // 16).to(tl.int64) * (padded * (2 * bits)) + (r % 16) * 4
    scale_row = (r // 16) * blocks * 16 + r % 16
    low_bits = tl.where(bits == 3, 2, bits)
    fields = 8 // low_bits
    split = tl.where(bits == 3, padded, 0)  # columns with a plane of high bits
    value = tl.zeros((BN, BM), tl.float32)
    for step in range(0, padded // 32):
        k = step * 32 + tl.arange(0, 32)
        column = k % 64
        chunk = weight_ptr + (base[:, None] + ((k // 64) * (128 * bits))[None, :])
        at = (column // (4 * fields)) * 64 + column % 4
        low = tl.load(chunk + at[None, :]).to(tl.int32)
        code = (low >> (low_bits * ((column // 4) % fields))[None, :]) & ((1 << low_bits) - 1)
        plane = (column // 32) * 64 + column % 4 + 256
        high = tl.load(chunk + plane[None, :], mask=(r >= 0)[:, None] & (k < split)[None, :], other=0)
        code = code | (((high.to(tl.int32) >> ((column // 4) % 8)[None, :]) & 1) << 2)
        w = (code * multiple - zero).to(tl.float32)
        x = tl.load(x_ptr + token.to(tl.int64)[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        big = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # 11 bits, as tf32 keeps
        part = tl.dot(w, tl.trans(big), input_precision="tf32")
        part = tl.dot(w, tl.trans(x - big), part, input_precision="tf32")
        block = tl.minimum((step * 32) >> log_block, blocks - 1)  # the last chunk may go beyond K
        scale = tl.load(scales_ptr + scale_row + block * 16).to(tl.float32)
        value += part * scale[:, None]
    store_outputs(value, y_ptr, bias_ptr, first, m, M, N, gate, has_bias, BN, BM)
