"""Folding leaves the function of every family unchanged, and every part of it is needed for that."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from lazy import Lazy

from bdq_export.learning.rotations import Rotations
from bdq_export.transform import Transforms, fold, random_hadamard
from bdq_models import supported
from bdq_runtime.specs import OnlineTransform

ALL = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
EDGES = ("attention_in", "value", "key_query", "mlp_in", "mlp_middle")
TOLERANCE = 1e-10
FOLD = sys.modules[fold.__module__]


def exact(tiny):
    """`tiny` with float64 weights."""
    return replace(tiny, weights={name: weight.double() for name, weight in tiny.weights.items()})


def folded(tiny, transforms):
    return fold(tiny.architecture, tiny.dimensions, tiny.weights, transforms)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("rotations", [False, True], ids=["diagonals", "rotations"])
def test_logits_unchanged(family, rotations, tiny_model, exact_logits, random_transforms, relative_error):
    tiny = exact(tiny_model(family))
    expected = exact_logits(tiny, tiny.weights)
    new = folded(tiny, random_transforms(tiny, rotations=rotations))
    assert relative_error(exact_logits(tiny, new), expected) < TOLERANCE
    touched = {f"model.layers.1.{path}.weight" for path in tiny.architecture.linears}
    assert not any(torch.equal(new[name], tiny.weights[name]) for name in touched)


@pytest.mark.parametrize("family", ["llama", "llama_biases", "qwen3", "phi3"])
def test_rotations_of_many_cayley_steps_can_be_folded(family, tiny_model, exact_logits, relative_error):
    tiny, generator = exact(tiny_model(family)), torch.Generator().manual_seed(3)
    dimensions = tiny.dimensions
    heads = {layer: random_hadamard(dimensions.head_dim, layer) for layer in range(dimensions.layers)}
    rotations = Rotations(random_hadamard(dimensions.hidden_size, 9), heads)
    for _ in range(50):
        for copy in rotations:
            copy.grad = torch.randn(copy.shape, generator=generator)
        rotations.step(1.5)
    residual, learned = rotations.exact()
    assert not any(torch.allclose(learned[layer], matrix, atol=0.1) for layer, matrix in heads.items())
    new = folded(tiny, Transforms(residual_rotation=residual, head_rotations=learned))
    assert relative_error(exact_logits(tiny, new), exact_logits(tiny, tiny.weights)) < TOLERANCE


@pytest.mark.parametrize("family", ALL)
def test_logits_unchanged_by_online_transforms(family, tiny_model, exact_logits, random_transforms, relative_error):
    tiny = exact(tiny_model(family))
    expected = exact_logits(tiny, tiny.weights)
    transforms = random_transforms(tiny, online=True, signs=True)
    new = folded(tiny, transforms)
    assert relative_error(exact_logits(tiny, new, transforms), expected) < TOLERANCE
    assert relative_error(exact_logits(tiny, new), expected) > 1e-3
    key = (1, "mlp_middle")
    wrong = transforms.online[key].diagonal.copy()
    wrong[0] *= 1.01
    online = {**transforms.online, key: replace(transforms.online[key], diagonal=wrong)}
    error = relative_error(exact_logits(tiny, new, replace(transforms, online=online)), expected)
    assert error > 1e3 * TOLERANCE


@pytest.mark.parametrize("family", ["llama_biases", "qwen3", "gemma3"])
@pytest.mark.parametrize("edge", EDGES)
def test_wrong_scale_is_seen(family, edge, tiny_model, exact_logits, random_transforms, relative_error):
    tiny = exact(tiny_model(family))
    expected = exact_logits(tiny, tiny.weights)
    new = folded(tiny, random_transforms(tiny, rotations=False, edges=[edge]))
    assert relative_error(exact_logits(tiny, new), expected) < TOLERANCE
    producer = tiny.architecture.edge(edge).producers[0]
    name = f"model.layers.0.{producer}.weight"
    new[name] = new[name].clone()
    offset = tiny.architecture.norm_offset if tiny.architecture.is_norm(producer) else 0.0
    new[name][0] = (new[name][0] + offset) * 1.01 - offset
    assert relative_error(exact_logits(tiny, new), expected) > 1e3 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "llama_biases"])
@pytest.mark.parametrize("leaf", ["self_attn.v_proj.bias", "self_attn.k_proj.bias", "self_attn.q_proj.bias"])
def test_forgotten_bias_is_seen(family, leaf, tiny_model, exact_logits, random_transforms, relative_error):
    tiny = exact(tiny_model(family))
    new = folded(tiny, random_transforms(tiny))
    for layer in range(3):
        new[f"model.layers.{layer}.{leaf}"] = tiny.weights[f"model.layers.{layer}.{leaf}"]
    error = relative_error(exact_logits(tiny, new), exact_logits(tiny, tiny.weights))
    assert error > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_untied_rope_pairs(family, tiny_model, exact_logits, random_transforms, relative_error, monkeypatch):
    tiny = exact(tiny_model(family))
    transforms = random_transforms(tiny, rotations=False, edges=["key_query"])
    scale = transforms.diagonals[0, "key_query"].clone()
    scale[0] *= 2
    untied = replace(transforms, diagonals={(0, "key_query"): scale})
    with pytest.raises(ValueError, match=r"layer 0, edge key_query: .*RoPE pair"):
        folded(tiny, untied)
    monkeypatch.setattr(FOLD, "check_transforms", lambda *_: None)
    error = relative_error(exact_logits(tiny, folded(tiny, untied)), exact_logits(tiny, tiny.weights))
    assert error > 1e-4


def test_partial_rotary_channels_are_free(tiny_model, exact_logits, relative_error):
    """Phi-3 rotates 12 of 16 channels: the other four need no partner."""
    tiny = exact(tiny_model("phi3"))
    scale = torch.ones(32).double()
    scale[12:16] = torch.tensor([0.5, 2.0, 3.0, 0.1])
    new = folded(tiny, Transforms(diagonals={(0, "key_query"): scale}))
    assert relative_error(exact_logits(tiny, new), exact_logits(tiny, tiny.weights)) < TOLERANCE


def test_fold_is_pure_and_unties(tiny_model, random_transforms):
    tiny = tiny_model("llama")
    before = {name: weight.clone() for name, weight in tiny.weights.items()}
    assert "lm_head.weight" not in before
    new = folded(tiny, random_transforms(tiny))
    assert all(torch.equal(tiny.weights[name], weight) for name, weight in before.items())
    assert set(new) == {*before, "lm_head.weight"}
    assert all(weight.dtype == torch.float32 for weight in new.values())
    assert torch.equal(new["model.norm.weight"], torch.ones(144))


def test_untouched_weights_are_shared(tiny_model):
    tiny = tiny_model("llama")
    new = folded(tiny, Transforms(diagonals={(1, "value"): torch.full((48,), 2.0)}))
    changed = {name for name in new if new[name] is not tiny.weights[name]}
    assert changed == {"model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"}
    assert folded(tiny, Transforms()) == tiny.weights


def test_order_of_the_sandwich(tiny_model):
    """v' = v Λa R2 Λb, row by row of v_proj."""
    tiny = exact(tiny_model("llama"))
    a, b = torch.rand(48).double() + 0.5, torch.rand(48).double() + 0.5
    rotation = random_hadamard(16, seed=3)
    new = folded(
        tiny,
        Transforms(diagonals={(0, "value"): b}, diagonals_before={(0, "value"): a}, head_rotations={0: rotation}),
    )
    name = "model.layers.0.self_attn.v_proj.weight"
    right = torch.diag(a) @ torch.kron(torch.eye(3).double(), rotation) @ torch.diag(b)
    torch.testing.assert_close(new[name], right.T @ tiny.weights[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        (Transforms(diagonals={(0, "elbow"): torch.ones(4)}), "no edge 'elbow'; it has"),
        (Transforms(diagonals={(3, "value"): torch.ones(48)}), "layer 3 does not exist, the model has 3"),
        (Transforms(diagonals={(0, "value"): torch.ones(144)}), r"shape \(144,\), expected \(48,\)"),
        (Transforms(diagonals={(0, "value"): torch.zeros(48)}), "0 or not finite"),
        (Transforms(diagonals_before={(0, "value"): torch.full((48,), torch.nan)}), "0 or not finite"),
        (Transforms(diagonals={(0, "value"): torch.full((48,), torch.inf)}), "0 or not finite"),
        (Transforms(online={(0, "mlp_middle"): OnlineTransform(64)}), "size is 64, expected .* divides 96"),
        (Transforms(online={(0, "mlp_middle"): OnlineTransform(24)}), "size is 24, expected a power of two"),
        (Transforms(online={(0, "mlp_middle"): OnlineTransform(32, interleave=5)}), "5 runs of channels"),
        (Transforms(online={(0, "key_query"): OnlineTransform(16)}), "no inputs of a linear"),
        (Transforms(online={(4, "mlp_middle"): OnlineTransform(32)}), "layer 4 does not exist"),
        (
            Transforms(online={(0, "mlp_middle"): OnlineTransform(32, np.ones(32, np.float32))}),
            r"shape \(32,\), expected \(96,\)",
        ),
        (Transforms(online={(0, "mlp_middle"): OnlineTransform(32, np.zeros(96, np.float32))}), "0 or not finite"),
        (Transforms(residual_rotation=torch.eye(64).double()), r"expected \(144, 144\)"),
        (Transforms(residual_rotation=1.01 * torch.eye(144).double()), "not orthogonal"),
        (Transforms(head_rotations={0: torch.ones(16, 16)}), "layer 0: a head rotation has condition number"),
        (Transforms(head_rotations={5: torch.eye(16)}), "layer 5 does not exist"),
        (Transforms(head_rotations={0: torch.eye(16).expand(9, 16, 16)}), "9 head rotations, expected 3"),
    ],
)
def test_transforms_that_do_not_fit(transforms, message, tiny_model):
    with pytest.raises(ValueError, match=message):
        folded(tiny_model("llama"), transforms)


def test_residual_rotation_needs_the_family(tiny_model):
    with pytest.raises(ValueError, match=r"gemma3_text: .*do not commute"):
        folded(tiny_model("gemma3"), Transforms(residual_rotation=torch.eye(64).double()))


def test_missing_weight(tiny_model):
    tiny = tiny_model("llama")
    del tiny.weights["model.layers.0.self_attn.o_proj.weight"]
    with pytest.raises(ValueError, match=r"o_proj\.weight is missing"):
        folded(tiny, Transforms(diagonals={(0, "value"): torch.ones(48)}))


def test_large_matrices_go_in_slabs(tiny_model, monkeypatch):
    tiny = tiny_model("llama")
    transforms = Transforms(residual_rotation=random_hadamard(144, seed=0))
    whole = folded(tiny, transforms)
    monkeypatch.setattr(FOLD, "ROWS", 33)
    slabs = folded(tiny, transforms)
    torch.testing.assert_close(slabs["lm_head.weight"], whole["lm_head.weight"], rtol=1e-6, atol=1e-7)


def test_every_family_is_covered(make_tiny_config):
    assert {make_tiny_config(family)["model_type"] for family in ALL} == set(supported())


def _per_row(matrix: torch.Tensor, bits: int = 4) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    scale = matrix.abs().amax(1, keepdim=True) / top
    return (matrix / scale).round().clamp(-top - 1, top) * scale


def test_literal_output_row_diagonal_is_a_no_op():
    """Q(Λ₁ x) · Q(W Λ₁⁻¹) with Λ₁ on tokens and on output rows: a scale per token and per row absorbs it.

    So the diagonals of this project act on the *input* channels, where no scale can absorb them.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(32, 64, generator=generator).double()
    weight = torch.randn(48, 64, generator=generator).double()
    plain = _per_row(tokens) @ _per_row(weight).T
    rows = torch.randn(48, generator=generator).double().exp()
    per_token = torch.randn(32, generator=generator).double().exp()
    literal = _per_row(per_token[:, None] * tokens) @ _per_row(weight / rows[:, None]).T
    literal = literal / per_token[:, None] * rows
    assert ((literal - plain).abs().amax() / plain.abs().amax()).item() < 1e-12
    columns = torch.randn(64, generator=generator).double().exp()
    useful = _per_row(tokens * columns) @ _per_row(weight / columns).T
    assert ((useful - plain).abs().amax() / plain.abs().amax()).item() > 1e-3


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("rotations", [False, True], ids=["diagonals", "rotations"])
def test_lazy_weights_are_folded_to_the_same_bits(family, rotations, tiny_model, random_transforms):
    tiny = tiny_model(family)
    transforms = random_transforms(tiny, rotations=rotations, online=True)
    expected = folded(tiny, transforms)
    lazy = fold(tiny.architecture, tiny.dimensions, Lazy(tiny.weights), transforms)
    assert list(lazy) == list(expected)
    assert len(lazy) == len(expected)
    for name in reversed(list(expected)):  # any order
        assert torch.equal(lazy[name], expected[name])
        assert lazy[name].dtype == expected[name].dtype
        assert lazy.shape(name) == expected[name].shape
    with pytest.raises(KeyError):
        lazy["model.layers.0.none.weight"]


def test_one_lazy_layer_is_folded_once_and_kept_alone(tiny_model, random_transforms):
    tiny = tiny_model("llama")
    weights = Lazy(tiny.weights)
    lazy = fold(tiny.architecture, tiny.dimensions, weights, random_transforms(tiny, rotations=False))
    assert not weights.read
    of_layer = {layer: [name for name in tiny.weights if f".{layer}." in name] for layer in (0, 1)}
    for _ in range(2):
        assert all(lazy[name] is lazy[name] for name in of_layer[0])
    assert sorted(weights.read) == sorted(of_layer[0])
    for name in of_layer[1]:
        lazy[name]
    assert sorted(weights.read) == sorted((*of_layer[0], *of_layer[1]))
    lazy[of_layer[0][0]]
    assert len(weights.read) == 2 * len(of_layer[0]) + len(of_layer[1])


def test_memory_of_a_lazy_layer_is_returned_before_the_next_is_folded(tiny_model, random_transforms, monkeypatch):
    """Gains that somebody keeps pin what the allocator holds between them, so it must return it layer by layer."""
    tiny = tiny_model("llama")
    lazy = fold(tiny.architecture, tiny.dimensions, Lazy(tiny.weights), random_transforms(tiny, rotations=False))
    matrices, held = [], []
    monkeypatch.setattr(FOLD, "return_freed_memory", lambda: held.append([each() is not None for each in matrices]))
    gains = []
    for layer in range(3):
        gains.append(lazy[f"model.layers.{layer}.input_layernorm.weight"])
        matrices.append(weakref.ref(lazy[f"model.layers.{layer}.mlp.down_proj.weight"]))
    assert held == [[], [False], [False, False]]
