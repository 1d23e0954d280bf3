"""A row of activations: Hadamard, diagonal, quantization (docs/ops.md, "Activations", "Hadamard"). All of it exact."""

import triton
import triton.language as tl

from bdq_runtime.gpu.kernels.names import named


@triton.jit
def round_even(x):
    """Round half to even for |x| < 2^22; what is larger stays larger than any grid."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def butterfly(v, log_n, BLOCK: tl.constexpr):
    """`v H` in blocks of 2^log_n; v `[BLOCK]` holds integers whose partial sums are exact."""
    i = tl.arange(0, BLOCK)
    for stage in range(0, log_n):
        bit = 1 << stage
        partner = tl.gather(v, i ^ bit, axis=0)
        v = tl.where((i & bit) != 0, partner - v, v + partner)
    return v


@triton.jit
def largest(x_ptr, K, BLOCK: tl.constexpr):
    """max|x| of a row."""
    top = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.abs(tl.load(x_ptr + k, mask=k < K, other=0.0)))
    return tl.max(top, axis=0)


@triton.jit
def hadamard(x_ptr, diagonal_ptr, y_ptr, K, interleave, log_n, grid, root, has_diagonal, BLOCK: tl.constexpr):
    """A row to y; grid = 2^-R, root = float32(1 / sqrt(n)). y may be x only where interleave is 1."""
    step = tl.maximum(largest(x_ptr, K, BLOCK) * grid, 1e-30)
    inverse = tl.div_rn(1.0, step)
    back = step * root
    diagonals = tl.where(has_diagonal != 0, K, 0)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        source = k % interleave * (K // interleave) + k // interleave
        v = round_even(tl.load(x_ptr + source, mask=k < K, other=0.0) * inverse)
        y = butterfly(v, log_n, BLOCK) * back
        y = y * tl.load(diagonal_ptr + k, mask=k < diagonals, other=1.0)
        tl.store(y_ptr + k, y, mask=k < K)


@triton.jit
def codes_of(x, inverse, low, high):
    """The integers of the activation rule, as floats."""
    return tl.minimum(tl.maximum(round_even(x * inverse), low), high)


@triton.jit
def quantize(
    x_ptr, q_ptr, scale_ptr, total_ptr, sums_ptr, row, K, padded, c, high, log_fields, has_sums, BLOCK: tl.constexpr
):
    """Codes of a row, bytes up to `padded` set to 0, their sum, and the sums of each 32 of them.

    The columns of each group of 4 * fields are stored in the order of the codes in the bytes of a weight: column
    4 t + j of a group at fields * j + t.
    """
    low = -high - 1.0
    scale = tl.maximum(largest(x_ptr, K, BLOCK) * c, 1e-30)
    inverse = tl.div_rn(1.0, scale)
    fields = 1 << log_fields
    groups = tl.where(has_sums != 0, padded // 32, 0)
    total = tl.zeros((BLOCK // 32,), tl.int32)
    for start in range(0, padded, BLOCK):
        k = start + tl.arange(0, BLOCK)
        q = codes_of(tl.load(x_ptr + k, mask=k < K, other=0.0), inverse, low, high).to(tl.int32)
        within = k & (4 * fields - 1)
        place = k - within + (within & 3) * fields + (within >> 2)
        tl.store(q_ptr + row * padded + place, q.to(tl.int8), mask=k < padded)
        sums = tl.sum(tl.reshape(q, (BLOCK // 32, 32)), axis=1)
        total += sums
        group = start // 32 + tl.arange(0, BLOCK // 32)
        tl.store(sums_ptr + row * (padded // 32) + group, sums, mask=group < groups)
    tl.store(scale_ptr + row, scale)
    tl.store(total_ptr + row, tl.sum(total, axis=0))


@triton.jit(repr=named("hadamard_rows"))
def hadamard_rows(x_ptr, diagonal_ptr, y_ptr, K, interleave, log_n, grid, root, has_diagonal, BLOCK: tl.constexpr):
    """y = Hadamard(x) * diagonal, `[M, K]`; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    hadamard(x_ptr + row * K, diagonal_ptr, y_ptr + row * K, K, interleave, log_n, grid, root, has_diagonal, BLOCK)


@triton.jit(repr=named("quantize_rows"))
def quantize_rows(
    x_ptr, q_ptr, scale_ptr, total_ptr, sums_ptr, K, padded, c, high, log_fields, has_sums, BLOCK: tl.constexpr
):
    """x `[M, K]` -> q int8 `[M, padded]`, scale `[M]`, total int32 `[M]`, sums int32 `[M, padded / 32]`."""
    row = tl.program_id(0).to(tl.int64)
    quantize(
        x_ptr + row * K, q_ptr, scale_ptr, total_ptr, sums_ptr, row, K, padded, c, high, log_fields, has_sums, BLOCK
    )


@triton.jit(repr=named("rotate_quantize_rows"))
def rotate_quantize_rows(
    x_ptr, diagonal_ptr, y_ptr, q_ptr, scale_ptr, total_ptr, sums_ptr,
    K, padded, interleave, log_n, grid, root, c, high, log_fields, has_sums, BLOCK: tl.constexpr
):  # fmt: skip
    """`hadamard_rows` to y `[M, K]`, then `quantize_rows` of it."""
    row = tl.program_id(0).to(tl.int64)
    y_row = y_ptr + row * K
    hadamard(x_ptr + row * K, diagonal_ptr, y_row, K, interleave, log_n, grid, root, 1, BLOCK)
    tl.debug_barrier()  # other threads of this program read what was written
    quantize(y_row, q_ptr, scale_ptr, total_ptr, sums_ptr, row, K, padded, c, high, log_fields, has_sums, BLOCK)


@triton.jit(repr=named("fake_quantize_rows"))
def fake_quantize_rows(x_ptr, y_ptr, K, c, high, BLOCK: tl.constexpr):
    """y = q * s, `[M, K]`."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.maximum(largest(x_ptr + row * K, K, BLOCK) * c, 1e-30)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        q = codes_of(tl.load(x_ptr + row * K + k, mask=k < K, other=0.0), inverse, -high - 1.0, high)
        tl.store(y_ptr + row * K + k, q * scale, mask=k < K)
