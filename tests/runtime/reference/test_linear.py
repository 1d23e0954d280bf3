"""Linear operators against weights that were never packed."""

from __future__ import annotations

import numpy as np
import pytest

from bdq_runtime.panels import interleave_panels, pack_panels, pack_scales
from bdq_runtime.reference import hadamard, low_bit_linear, quantize_activations

K = 200
RNG = np.random.default_rng(0)


def _weights(n: int, bits: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    return RNG.integers(0, 1 << bits, (n, K), dtype=np.uint8), (RNG.random((n, blocks)) * 0.1).astype(np.float16)


def _values(codes: np.ndarray, bits: int, grid: int) -> np.ndarray:
    u = codes.astype(np.int64)
    return u - 2 ** (bits - 1) if grid == 0 else 2 * u - (2**bits - 1)


CASES = [
    (bits, grid, block) for bits in (2, 3, 4, 8) for grid in (0, 1) for block in (0, 32, 128) if bits < 8 or not grid
]


@pytest.mark.parametrize(("bits", "grid", "block"), CASES)
@pytest.mark.parametrize("activation_bits", [3, 4, 8, 16])
def test_it_is_the_matmul_of_what_codes_stand_for(bits: int, grid: int, block: int, activation_bits: int) -> None:
    blocks = -(-K // block) if block else 1
    codes, scales = _weights(19, bits, blocks)
    x = RNG.standard_normal((2, 3, K)).astype(np.float32)
    bias = RNG.standard_normal(19).astype(np.float32)
    spread = np.repeat(scales.astype(np.float64), block or K, axis=1)[:, :K]
    if activation_bits == 16:
        q, s = x.astype(np.float64), 1.0
    else:
        q, s = quantize_activations(x, activation_bits, 0.9)
        q, s = q.astype(np.float64), s.astype(np.float64)
    expected = s * (q @ (_values(codes, bits, grid) * spread).T) + bias
    y = low_bit_linear(
        x,
        pack_panels(codes, bits),
        pack_scales(scales),
        n=19,
        weight_bits=bits,
        weight_grid=grid,
        block_size=block,
        activation_bits=activation_bits,
        activation_clip=0.9,
        bias=bias,
    )
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_a_gate_takes_panels_in_turn(gate: str) -> None:
    x = RNG.standard_normal((5, K)).astype(np.float32)
    first, second = _weights(37, 4, 1), _weights(37, 4, 1)
    bias = RNG.standard_normal(74).astype(np.float32)
    attributes = {"n": 37, "weight_bits": 4, "activation_bits": 8}
    g, u = (
        low_bit_linear(x, pack_panels(codes, 4), pack_scales(scales), bias=part, **attributes).astype(np.float64)
        for (codes, scales), part in zip((first, second), np.split(bias, 2), strict=True)
    )
    act = g / (1 + np.exp(-g)) if gate == "silu" else g / (1 + np.exp(-2 * 0.7978845608 * (g + 0.044715 * g**3)))
    y = low_bit_linear(
        x,
        interleave_panels(pack_panels(first[0], 4), pack_panels(second[0], 4)),
        interleave_panels(pack_scales(first[1]), pack_scales(second[1])),
        bias=bias,
        gate=gate,
        **attributes,
    )
    np.testing.assert_allclose(y, act * u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("interleave", [1, 25])
def test_a_rotated_linear_is_the_linear_of_rotated_rows(interleave: int) -> None:
    codes, scales = _weights(9, 3, 1)
    packed = (pack_panels(codes, 3), pack_scales(scales))
    x, diagonal = RNG.standard_normal((4, K)).astype(np.float32), RNG.random(K).astype(np.float32)
    attributes = {"n": 9, "weight_bits": 3, "activation_bits": 4}
    y = low_bit_linear(x, *packed, hadamard_size=8, hadamard_interleave=interleave, diagonal=diagonal, **attributes)
    assert np.array_equal(y, low_bit_linear(hadamard(x, 8, interleave) * diagonal, *packed, **attributes))


def test_what_no_operator_has_is_refused() -> None:
    codes, scales = _weights(9, 4, 1)
    packed = (pack_panels(codes, 4), pack_scales(scales))
    x = np.ones((1, K), np.float32)
    with pytest.raises(ValueError, match="block size is 16"):
        low_bit_linear(x, *packed, n=9, weight_bits=4, activation_bits=8, block_size=16)
    with pytest.raises(ValueError, match="8 bits on grid 1"):
        low_bit_linear(x, *packed, n=9, weight_bits=8, activation_bits=8, weight_grid=1)
    with pytest.raises(ValueError, match=r"expected \(9, 7\)"):
        low_bit_linear(x, *packed, n=9, weight_bits=4, activation_bits=8, block_size=32)
