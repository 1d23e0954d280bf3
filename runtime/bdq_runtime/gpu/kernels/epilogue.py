"""What follows a matmul: bias, gate, store."""

import triton
import triton.language as tl


@triton.jit
def store_outputs(value, y_ptr, bias_ptr, first, m, M, N, gate, has_bias, BN: tl.constexpr, BM: tl.constexpr):
    """value `[BN, BM]` of panel rows first .. and tokens m to y `[M, N]`.

    gate 0: the rows are channels. Otherwise they are 16 channels of the gate and 16 of up in turn; 1 is silu, 2
    gelu_tanh.
    """
    y_row = y_ptr + m.to(tl.int64)[None, :] * N
    biases = tl.where(has_bias != 0, N, 0)
    if gate == 0:
        n = first + tl.arange(0, BN)
        bias = tl.load(bias_ptr + n, mask=n < biases, other=0.0)
        tl.store(y_row + n[:, None], value + bias[:, None], mask=(n < N)[:, None] & (m < M)[None, :])
    else:
        c = first // 2 + tl.arange(0, BN // 2)
        halves = tl.permute(tl.reshape(value, (BN // 32, 2, 16, BM)), (0, 2, 3, 1))
        gates, ups = tl.split(halves)
        g = tl.reshape(gates, (BN // 2, BM)) + tl.load(bias_ptr + c, mask=c < biases, other=0.0)[:, None]
        u = tl.reshape(ups, (BN // 2, BM)) + tl.load(bias_ptr + N + c, mask=c < biases, other=0.0)[:, None]
        # gelu_tanh(g) = g / (1 + exp(-2 z)), z = sqrt(2 / pi) (g + 0.044715 g^3)
        slope = tl.where(gate == 1, g, 1.5957691216057308 * (g + 0.044715 * (g * g * g)))
        tl.store(y_row + c[:, None], g / (1.0 + tl.exp(-slope)) * u, mask=(c < N)[:, None] & (m < M)[None, :])
