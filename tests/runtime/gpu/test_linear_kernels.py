"""Low-bit matmuls on the GPU against the NumPy reference: bits where docs/ops.md says exact, rounding elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from bdq_runtime.panels import CHUNK, interleave_panels, pack_panels, pack_scales
from bdq_runtime.reference import low_bit_linear

Array = npt.NDArray[Any]
FIELDS = {2: 4, 3: 8, 4: 2, 8: 1}


@dataclass(frozen=True)
class Case:
    """One linear; `gate` as the reference names it."""

    m: int
    k: int
    n: int
    bits: int
    activation_bits: int = 4
    grid: int = 0
    block_size: int = 0
    gate: str | None = None
    bias: bool = False


@dataclass(frozen=True)
class Data:
    """Inputs of a case and what the reference makes of them."""

    x: Array
    weight: Array
    scales: Array
    bias: Array | None
    y: Array


def _data(case: Case, seed: int = 0) -> Data:
    random = np.random.default_rng(seed)
    blocks = -(-case.k // case.block_size) if case.block_size else 1
    halves = 2 if case.gate else 1
    packed, scales = [], []
    for _ in range(halves):
        codes = random.integers(0, 2**case.bits, (case.n, case.k), dtype=np.uint8)
        packed.append(pack_panels(codes, case.bits))
        scales.append(pack_scales(random.uniform(0.01, 0.03, (case.n, blocks)) * random.choice([-1, 1], (case.n, 1))))
    x = (random.standard_normal((case.m, case.k)) * 3).astype(np.float32)
    bias = random.standard_normal(halves * case.n).astype(np.float32) if case.bias else None
    weight, scale = (interleave_panels(*parts) if case.gate else parts[0] for parts in (packed, scales))
    y = low_bit_linear(
        x,
        weight,
        scale,
        n=case.n,
        weight_bits=case.bits,
        activation_bits=case.activation_bits,
        weight_grid=case.grid,
        block_size=case.block_size,
        activation_clip=0.9,
        bias=bias,
        gate=case.gate,
    )
    return Data(x, weight, scale, bias, y)


def _grid(case: Case, signed: bool) -> tuple[int, int]:
    """A weight is multiple * code - zero; the matmul on tensor cores has 8-bit codes less 128."""
    if case.grid:
        return 2, 2**case.bits - 1
    return 1, 0 if signed and case.bits == 8 else 2 ** (case.bits - 1)


def _tail(case: Case, data: Data, signed: bool) -> tuple[Any, ...]:
    blocks = data.scales.shape[1]
    log_block = case.block_size.bit_length() - 1 if case.block_size else 30
    gate = {None: 0, "silu": 1, "gelu_tanh": 2}[case.gate]
    return (*_grid(case, signed), blocks, log_block, gate, int(case.bias))


def _quantized(
    launch: Callable[..., None], case: Case, x: Array, fields: int
) -> tuple[int, Array, Array, Array, Array]:
    padded = -(-case.k // CHUNK) * CHUNK
    q = np.zeros((case.m, padded), np.int8)
    scale, total = np.zeros(case.m, np.float32), np.zeros(case.m, np.int32)
    sums = np.zeros((case.m, padded // 32), np.int32)
    high = 2 ** (case.activation_bits - 1) - 1
    factor = float(np.float32(0.9) / np.float32(high))
    launch(
        "rows.quantize_rows",
        (case.m,),
        *(x, q, scale, total, sums, case.k, padded, factor, float(high), fields.bit_length() - 1, 1),
        BLOCK=1024,
    )
    return padded, q, scale, total, sums


def _gemm(launch: Callable[..., None], case: Case, data: Data, bm: int = 16, bn: int = 64) -> Array:
    padded, q, scale, total, sums = _quantized(launch, case, data.x, FIELDS[case.bits])
    rows = 16 * data.weight.shape[0]
    y = np.full((case.m, case.n), np.nan, np.float32)
    launch(
        "gemm.low_bit_gemm",
        (-(-case.m // bm), -(-rows // bn)),
        *(q, scale, total, sums, data.weight, data.scales, data.bias if case.bias else scale, y),
        *(case.m, case.n, rows, padded, *_tail(case, data, signed=True)),
        **dict(BITS=case.bits, BN=bn, BM=bm, BLOCKED=bool(case.block_size), ASM=False),
    )
    return y


def _gemv(launch: Callable[..., None], case: Case, data: Data) -> Array:
    padded, q, scale, total, _ = _quantized(launch, case, data.x, 1)
    rows = 16 * data.weight.shape[0]
    y = np.full((case.m, case.n), np.nan, np.float32)
    launch(
        "gemv.low_bit_gemv",
        (case.m, -(-rows // 32)),
        *(
            q.view(np.int32),
            scale,
            total,
            data.weight.view(np.int32),
            data.scales,
            data.bias if case.bias else scale,
            y,
        ),
        *(case.n, rows, padded, *_tail(case, data, signed=False)),
        **dict(BITS=case.bits, KG=32, ASM=False),
    )
    return y


def _float_gemm(launch: Callable[..., None], case: Case, data: Data) -> Array:
    padded, rows = -(-case.k // CHUNK) * CHUNK, 16 * data.weight.shape[0]
    y = np.full((case.m, case.n), np.nan, np.float32)
    launch(
        "float_gemm.float_gemm",
        (-(-case.m // 16), -(-rows // 64)),
        *(data.x, data.weight, data.scales, data.bias if case.bias else data.x, y),
        *(case.m, case.n, rows, case.k, padded, case.bits, *_tail(case, data, signed=False)),
        **dict(BN=64, BM=16),
    )
    return y


def _assert_close(found: Array, expected: Array) -> None:
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < 3e-6, error
    assert np.abs(found * 1.01 - expected).max() / np.abs(expected).max() > 3e-6


KERNELS = {"gemm": _gemm, "gemv": _gemv}
EXACT = [
    Case(3, 96, 20, 4),
    Case(17, 576, 40, 2, grid=1, bias=True),
    Case(2, 200, 33, 3, activation_bits=3, grid=1),
    Case(2, 320, 16, 3, activation_bits=8, bias=True),
    Case(1, 130, 70, 8, activation_bits=8),
    Case(5, 64, 100, 4, activation_bits=3, grid=1, bias=True),
]
ROUNDED = [
    Case(3, 96, 20, 4, block_size=32),
    Case(2, 400, 40, 2, block_size=128, grid=1, bias=True),
    Case(2, 200, 33, 3, block_size=64, activation_bits=8),
    Case(1, 520, 16, 8, block_size=256),
    Case(2, 100, 18, 4, gate="silu", bias=True),
    Case(3, 96, 40, 3, gate="gelu_tanh"),
    Case(2, 160, 24, 2, gate="silu", block_size=32, bias=True),
]


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_scales_of_channels_give_the_bits_of_the_reference(
    launch: Callable[..., None], kernel: str, case: Case
) -> None:
    data = _data(case)
    np.testing.assert_array_equal(KERNELS[kernel](launch, case, data), data.y)


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_scales_of_blocks_and_gates_agree_to_rounding(launch: Callable[..., None], kernel: str, case: Case) -> None:
    data = _data(case)
    _assert_close(KERNELS[kernel](launch, case, data), data.y)


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 96, 20, 4, 16),
        Case(2, 200, 33, 3, 16, grid=1, bias=True),
        Case(17, 160, 40, 2, 16, block_size=32),
        Case(1, 130, 20, 8, 16, block_size=64, gate="silu"),
    ],
    ids=str,
)
def test_float_activations_agree_to_rounding(launch: Callable[..., None], case: Case) -> None:
    data = _data(case)
    _assert_close(_float_gemm(launch, case, data), data.y)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_tiles_of_the_images_give_the_same_bits(launch: Callable[..., None], bits: int) -> None:
    """Sizes beyond one tile of 128 tokens by 128 channels."""
    case = Case(130, 640, 150, bits, activation_bits=8, bias=True)
    data = _data(case)
    np.testing.assert_array_equal(_gemm(launch, case, data, bm=128, bn=128), data.y)
