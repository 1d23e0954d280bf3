"""One function has the values and gradients of the chain of products that it stands for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from bdq_export.learning.scaled_product import ScaledWeight, scaled_product
from bdq_export.quantize.rtn import rtn
from bdq_runtime.packing import ODD, PerBlock, PerChannel, QuantSpec

ROWS, COLUMNS = 12, 40


def values(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def chain(x, steps, log_factors, quantized):
    """The same with every intermediate value, by autograd."""
    block = quantized.spec.block_size(COLUMNS)
    factors = log_factors.exp().repeat_interleave(block, 1)[:, :COLUMNS]
    y = x @ (torch.from_numpy(quantized.dequantize()) * factors).t()
    return y if steps is None else y * steps


@pytest.mark.parametrize("granularity", [PerChannel(), PerBlock(16)], ids=str)
@pytest.mark.parametrize("integers", [True, False])
def test_values_and_gradients(granularity, integers):
    quantized = rtn(values(ROWS, COLUMNS, seed=1), QuantSpec(4, granularity))
    log_factors = Parameter(values(*quantized.scales.shape, seed=2) * 0.1)
    x = (values(2, 5, COLUMNS, seed=3) * 3).round().requires_grad_()
    steps = values(2, 5, 1, seed=4).abs().requires_grad_() if integers else None
    inputs = [x, log_factors, *([steps] if steps is not None else [])]
    above = values(2, 5, ROWS, seed=5)
    weight = ScaledWeight.of(quantized, log_factors, torch.float32)
    found = scaled_product(x, steps, log_factors, weight)
    expected = chain(x, steps, log_factors, quantized)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found, inputs, above), torch.autograd.grad(expected, inputs, above)
    for got, wanted in zip(*gradients, strict=True):
        assert got.shape == wanted.shape
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got * 1.01, wanted, rtol=1e-4, atol=1e-4)


def test_a_weight_that_is_not_quantized_is_a_plain_product():
    weight = values(ROWS, COLUMNS, seed=1)
    x = values(3, COLUMNS, seed=2).requires_grad_()
    found = scaled_product(x, None, None, ScaledWeight.of_float(weight, torch.float32))
    torch.testing.assert_close(found, x @ weight.t())
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["integer", "odd", "asymmetric"])
def test_rows_of_one_scale_are_kept_as_integers(bits, kind):
    """Exactly what the values are in scales, whatever the grid; a row of zeros stays one, and of odd sign, too."""
    if kind == "odd" and bits == 8:
        pytest.skip("no such grid")
    spec = QuantSpec(bits, PerChannel(), symmetric=kind != "asymmetric", grid=ODD if kind == "odd" else "integer")
    quantized = rtn(values(ROWS, COLUMNS, seed=1), spec)
    quantized.scales[3], quantized.scales[5] = 0.0, -0.25
    part = ScaledWeight.of(quantized, Parameter(torch.zeros(ROWS, 1)), torch.bfloat16)
    found = part.values.float()
    assert torch.equal(found, found.round())
    assert found[4].any()
    assert not found[3].any()
    assert torch.equal(found * part.scales[:, None], torch.from_numpy(quantized.dequantize()))


def test_the_order_of_codes_in_memory_does_not_matter():
    quantized = rtn(values(ROWS, COLUMNS, seed=1), QuantSpec(4, PerChannel()))
    turned = replace(quantized, codes=np.asfortranarray(quantized.codes))
    parts = [ScaledWeight.of(each, Parameter(torch.zeros(ROWS, 1)), torch.bfloat16) for each in (quantized, turned)]
    assert [part.values.stride() for part in parts] == [(COLUMNS, 1)] * 2
    assert torch.equal(parts[0].values, parts[1].values)
