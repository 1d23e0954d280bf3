"""The transforms of quantized activations leave the float model as it is and make its sites flatter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bdq_export.calibration.dynamic import DynamicBits
from bdq_export.calibration.head_alignment import alignment
from bdq_export.calibration.sandwich import ONLINE, PLAIN, sandwich, with_mixed_heads
from bdq_export.calibration.workspace import Workspace
from bdq_export.fake_quant import FakeQuantization, attach, fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.options import KRONECKER, PARTIAL
from bdq_export.progress import QuietProgress
from bdq_export.transform import Transforms, fold, online_by_path, random_hadamard
from bdq_export.transform.hadamard import hadamard, interleaved

FAMILIES = ("llama", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
NAMES = ("none", "smooth", "hadamard", "bdq", "bdq-rotated", ONLINE, PLAIN)


def make_space(tiny, bits: DynamicBits) -> Workspace:
    model = load_float_model(tiny, tiny.weights)
    tokens = torch.randint(0, tiny.dimensions.vocab_size, (6, 32), generator=torch.Generator().manual_seed(2))
    space = Workspace(
        tiny,
        model,
        tiny.architecture,
        tiny.dimensions,
        tiny.weights,
        tokens,
        lambda path: None,
        QuietProgress(),
        dynamic=bits,
    )
    attach(model, tiny.architecture, tiny.dimensions, space.quantization.view)
    return space


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [DynamicBits(4, 4), DynamicBits(None, 4)], ids=["a4kv4", "kv4"])
def test_logits_unchanged(family, bits, tiny_model):
    tiny = tiny_model(family)
    space = make_space(tiny, bits)
    tokens = space.tokens[:2]
    with torch.no_grad():
        expected = space.model(tokens).logits
    statistics = space.statistics()
    for name in NAMES if bits.activations is None else (*NAMES, *PARTIAL, KRONECKER):
        transforms = sandwich(space, name, statistics, seed=3)
        online = online_by_path(tiny.architecture, transforms)
        assert not online or bits.activations
        rotates = name not in ("none", "smooth", "bdq", PLAIN)
        assert bool(online) == (rotates and bits.activations is not None)
        weights = fold(tiny.architecture, tiny.dimensions, tiny.weights, transforms)
        model = load_float_model(tiny, weights)
        with (
            torch.no_grad(),
            fake_quantized(model, tiny.architecture, tiny.dimensions, FakeQuantization(online=online)),
        ):
            got = model(tokens).logits
        error = float((got - expected).abs().amax() / expected.abs().amax())
        assert error < 1e-3, f"{name}: {error}"
        with torch.no_grad():
            assert torch.equal(space.model(tokens).logits, expected), f"{name} left the model changed"


def test_parts_of_the_sandwich_differ_in_their_diagonals_only(tiny_model):
    tiny = tiny_model("llama")
    space = make_space(tiny, DynamicBits(4, 4))
    statistics = space.statistics()
    found = {name: sandwich(space, name, statistics, seed=3) for name in (ONLINE, *PARTIAL)}
    whole = found[ONLINE]
    assert whole.online
    for name, part in found.items():
        assert part.online.keys() == whole.online.keys()
        for key, online in part.online.items():
            assert online.hadamard_size == whole.online[key].hadamard_size > 1
            if key[1] == "value":
                assert bool((online.diagonal == 1).all())
                continue
            assert (online.diagonal is not None) == (name in (ONLINE, "diag"))
            before, both = part.diagonals_before[key], whole.diagonals_before[key]
            assert torch.equal(before.sign(), both.sign())
            assert bool((before.abs() == 1).all()) == (name in ("diag", "diag-none"))
            if name == "diag-before":
                assert torch.equal(before, both)
        for layer, heads in part.head_rotations.items():
            assert torch.equal(heads, whole.head_rotations[layer])


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 9, 14, 32])
def test_blocks_of_the_transform_in_front_of_o_proj_have_channels_of_all_heads(tiny_model, heads):
    tiny = tiny_model("llama")
    dimensions = replace(tiny.dimensions, heads=heads, kv_heads=1, head_dim=64)
    online = with_mixed_heads(tiny.architecture, dimensions, Transforms(), 0).online
    assert bool(online) == (heads > 1)
    for transform in online.values():
        head = interleaved(torch.arange(64 * heads) // 64, transform.interleave)
        for block in head.split(transform.hadamard_size):
            assert len(block.unique()) == heads


@pytest.mark.parametrize("heads", [4, 9])
def test_mixing_heads_does_not_undo_the_rotation_within_them(tiny_model, heads):
    tiny = tiny_model("llama")
    dimensions = replace(tiny.dimensions, layers=1, heads=heads, kv_heads=1, head_dim=64)
    start = Transforms(head_rotations={0: random_hadamard(64, 1)[None]})
    found = with_mixed_heads(tiny.architecture, dimensions, start, 0)
    (transform,) = found.online.values()
    rotated = torch.kron(torch.eye(heads, dtype=torch.float64), found.head_rotations[0][0])
    blocks = interleaved(rotated, transform.interleave).unflatten(-1, (-1, transform.hadamard_size))
    mixed = (blocks @ hadamard(transform.hadamard_size)).flatten(-2)
    # What was one channel is spread out, and nothing was lost on the way.
    assert mixed.abs().max() < 0.5
    torch.testing.assert_close(mixed @ mixed.T, torch.eye(64 * heads, dtype=torch.float64))


def test_alignment_lowers_noise_and_evens_out_channels():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(16, 16, generator=generator).double()
    scale = torch.randn(16, generator=generator).double().exp()
    covariance = mixing @ torch.diag(scale) @ mixing.T
    other = torch.randn(16, 16, generator=generator).double()
    gram = other @ other.T
    m = alignment(covariance, gram, seed=1)
    inverse = torch.linalg.inv(m)
    moved, weights = m.T @ covariance @ m, inverse @ gram @ inverse.T
    noise = torch.trace(moved) * torch.trace(weights)
    diagonal = (covariance.diagonal() * gram.diagonal()).sqrt().sum() ** 2
    assert noise < 0.7 * diagonal  # the best diagonal
    for energies in (moved.diagonal(), weights.diagonal()):
        assert energies.max() < 1.2 * energies.min()
    torch.testing.assert_close(alignment(covariance, gram, seed=1), m, rtol=0, atol=0)


@pytest.mark.parametrize("dead", ["covariance", "gram"])
def test_a_dead_head_gets_a_rotation(dead):
    sides = {"covariance": torch.eye(8).double(), "gram": torch.eye(8).double(), dead: torch.zeros(8, 8).double()}
    m = alignment(sides["covariance"], sides["gram"], seed=0)
    torch.testing.assert_close(m @ m.T, torch.eye(8).double())
