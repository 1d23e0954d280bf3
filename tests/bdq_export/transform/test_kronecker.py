"""Kronecker products in front of linears: what they compute, that folding undoes them, and what does not fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bdq_export.fake_quant import apply_online
from bdq_export.transform import Transforms, fold
from bdq_export.transform.channels import consumer_channels
from bdq_export.transform.kronecker import (
    apply_kronecker,
    condition,
    factor_sizes,
    random_orthogonal,
    same_kronecker,
    unapply_kronecker,
)
from bdq_models import Side
from bdq_runtime.specs import Kronecker, OnlineTransform


def invertible(size: int, generator: torch.Generator) -> np.ndarray:
    noise = 0.3 * torch.randn(size, size, generator=generator) / size**0.5
    return (random_orthogonal(size, generator).float() + noise).numpy()


def random_kronecker(channels: int, seed: int = 0, left: int | None = None, right: bool = True) -> Kronecker:
    generator = torch.Generator().manual_seed(seed)
    first = left or factor_sizes(channels)[0]
    return Kronecker(invertible(first, generator), invertible(channels // first, generator) if right else None)


@pytest.mark.parametrize("right", [True, False])
def test_it_is_the_product_of_numpy(right: bool) -> None:
    kronecker = random_kronecker(12, left=3, right=right)
    whole = np.kron(kronecker.left.astype(np.float64), np.eye(4) if kronecker.right is None else kronecker.right)
    x = np.random.default_rng(0).normal(size=(2, 5, 12))
    expected = x @ whole
    np.testing.assert_allclose(apply_kronecker(torch.from_numpy(x), kronecker), expected, rtol=1e-12, atol=1e-12)
    single = apply_online(torch.from_numpy(x).float(), OnlineTransform(1, kronecker=kronecker))
    np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(1)).double()
    product = torch.from_numpy(expected) @ unapply_kronecker(weight, kronecker).T
    torch.testing.assert_close(product, torch.from_numpy(x) @ weight.T, rtol=1e-10, atol=1e-10)


def test_it_is_not_rounded_to_bfloat16_by_autocast() -> None:
    kronecker, x = random_kronecker(64), torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = apply_kronecker(x, kronecker)
    assert torch.equal(found, apply_kronecker(x, kronecker))


@pytest.mark.parametrize(
    ("channels", "sizes"), [(576, (24, 24)), (1536, (32, 48)), (4096, (64, 64)), (14336, (112, 128)), (13, (1, 13))]
)
def test_factors_are_as_near_as_possible(channels: int, sizes: tuple[int, int]) -> None:
    assert factor_sizes(channels) == sizes


@pytest.mark.parametrize("family", ["llama_biases", "gemma3", "phi3"])
def test_folding_leaves_the_function(family, tiny_model, exact_logits, random_transforms, relative_error):
    tiny = tiny_model(family)
    tiny = replace(tiny, weights={name: weight.double() for name, weight in tiny.weights.items()})
    expected = exact_logits(tiny, tiny.weights)
    online = {
        (layer, edge.name): OnlineTransform(
            1,
            kronecker=random_kronecker(
                consumer_channels(edge, tiny.dimensions),
                seed=layer,
                left=tiny.dimensions.heads if edge.name == "value" else None,
                right=edge.name != "value",
            ),
        )
        for layer in range(tiny.dimensions.layers)
        for edge in tiny.architecture.edges
        if edge.consumer_side is Side.INPUT
    }
    transforms = replace(random_transforms(tiny), online=online)
    new = fold(tiny.architecture, tiny.dimensions, tiny.weights, transforms)
    assert relative_error(exact_logits(tiny, new, transforms), expected) < 1e-10
    assert relative_error(exact_logits(tiny, new), expected) > 1e-3
    key = (1, "value")
    given = online[key].kronecker
    assert given is not None
    wrong = Kronecker(np.ascontiguousarray(given.left.T))
    mixed = replace(transforms, online={**online, key: OnlineTransform(1, kronecker=wrong)})
    assert relative_error(exact_logits(tiny, new, mixed), expected) > 1e-6


EYE = np.eye(12, dtype=np.float32)


@pytest.mark.parametrize(
    ("online", "message"),
    [
        (OnlineTransform(1, kronecker=Kronecker(EYE, EYE[:7, :7])), "square ones whose product has 96 rows"),
        (OnlineTransform(1, kronecker=Kronecker(EYE, EYE[:, :8])), "square ones whose product has 96 rows"),
        (OnlineTransform(1, kronecker=Kronecker(EYE[:7, :7])), "square ones whose product has 96 rows"),
        (OnlineTransform(32, kronecker=Kronecker(EYE, EYE[:8, :8])), "expected it alone"),
        (OnlineTransform(1, np.ones(96, np.float32), Kronecker(EYE, EYE[:8, :8])), "expected it alone"),
        (OnlineTransform(1, kronecker=Kronecker(np.ones_like(EYE), EYE[:8, :8])), "condition number"),
        (OnlineTransform(1, kronecker=Kronecker(EYE * np.nan, EYE[:8, :8])), "condition number inf"),
        (
            OnlineTransform(
                1,
                kronecker=Kronecker(
                    np.diag(np.geomspace(1, 300, 12, dtype=np.float32)),
                    np.diag(np.geomspace(1, 300, 8, dtype=np.float32)),
                ),
            ),
            r"condition number 9\.0e\+04, expected 1e\+04 or less",
        ),
    ],
)
def test_what_does_not_fit(online, message, tiny_model):
    tiny = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        fold(tiny.architecture, tiny.dimensions, tiny.weights, Transforms(online={(0, "mlp_middle"): online}))


def test_the_same_is_the_same_to_the_last_bit() -> None:
    one, other = random_kronecker(96), random_kronecker(96)
    assert same_kronecker(one, other)
    assert same_kronecker(None, None)
    assert not same_kronecker(one, None)
    assert not same_kronecker(one, Kronecker(one.left))
    assert not same_kronecker(one, replace(one, left=np.nextafter(one.left, np.float32(2))))
    assert condition([torch.eye(3), None]) == pytest.approx(1)
