"""Gradients block by block are those of the whole model, and predict what rounding costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bdq_export.calibration import output_gradients, precision
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.loss import HeldOutLoss
from bdq_export.calibration.output_gradients import site_gradients
from bdq_export.fake_quant import online_hadamard
from bdq_export.float_model import load_float_model, locate_linear, replace_weights
from bdq_runtime.specs import OnlineTransform

TOKENS = torch.randint(0, 320, (6, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    monkeypatch.setattr(output_gradients, "_HELD", torch.float32)


def by_path(tiny, model, online=None, tokens=TOKENS, seed=0):
    """Canonical path -> (inputs, gradients)."""
    runner = BlockRunner(model, tiny.architecture.layers, tokens)
    found = {}
    for (sites,) in site_gradients(runner, tiny.architecture, tiny.dimensions, online or {}, [seed] * len(tokens)):
        for seen in sites:
            found |= {path: (seen.inputs, seen.gradients[path]) for path in seen.site.paths}
    return found


def whole_model(tiny, model, labels):
    """The same by one backward pass of the whole model, for given labels."""
    seen = {}

    def hook(name):
        def record(_module, inputs, output):
            output.retain_grad()
            seen[name] = (inputs[0], output)

        return record

    linears = [tiny.architecture.layer_path(layer, path) for layer in range(3) for path in tiny.architecture.linears]
    places = {path: locate_linear(tiny.architecture, tiny.dimensions, path) for path in linears}
    handles = [
        model.get_submodule(name).register_forward_hook(hook(name))
        for name in {place.module for place in places.values()}
    ]
    embeddings = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    likelihoods = torch.log_softmax(model(inputs_embeds=embeddings).logits, -1)
    likelihoods.gather(-1, labels[..., None]).sum().backward()
    for handle in handles:
        handle.remove()
    return {
        path: (seen[at.module][0].flatten(0, 1), seen[at.module][1].grad.flatten(0, 1)[:, at.start : at.stop])
        for path, at in places.items()
    }


@pytest.mark.parametrize("family", ["llama", "llama_biases", "qwen3", "phi3"])
def test_blocks_one_by_one_give_the_gradients_of_the_whole_model(family, tiny_model, monkeypatch):
    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    monkeypatch.setattr(output_gradients, "draw", lambda logits, _generator: logits.argmax(-1, keepdim=True))
    labels = model(TOKENS).logits.argmax(-1)
    expected, found = whole_model(tiny, model, labels), by_path(tiny, model)
    assert found.keys() == expected.keys()
    for path, (inputs, gradients) in expected.items():
        scale = float(gradients.abs().max())
        assert scale > 0
        torch.testing.assert_close(found[path][0], inputs.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[path][1], gradients, rtol=1e-3, atol=1e-4 * scale)
        assert not torch.allclose(found[path][1] * 1.01, gradients, rtol=1e-3, atol=1e-4 * scale)


def test_gradients_go_through_online_transforms(tiny_model, monkeypatch):
    tiny = tiny_model("llama")
    monkeypatch.setattr(output_gradients, "draw", lambda logits, _generator: logits.argmax(-1, keepdim=True))
    model = load_float_model(tiny, tiny.weights)
    plain = by_path(tiny, model)
    diagonal = np.linspace(0.5, 2.0, 96, dtype=np.float32)
    online, weights = {}, dict(tiny.weights)
    for layer in range(3):
        path = tiny.architecture.layer_path(layer, "mlp.down_proj")
        online[path] = OnlineTransform(32, diagonal)
        # x' = x R D, so W' = W R D⁻¹ for the symmetric orthogonal R.
        rotation = _rotation(32, 96)
        weights[f"{path}.weight"] = tiny.weights[f"{path}.weight"] @ rotation / torch.from_numpy(diagonal)
    replace_weights(model, tiny.architecture, weights)
    for path, (inputs, gradients) in by_path(tiny, model, online).items():
        scale = float(gradients.abs().max())
        torch.testing.assert_close(gradients, plain[path][1], rtol=1e-2, atol=1e-3 * scale)
        if path in online:
            expected = plain[path][0] @ _rotation(32, 96) * torch.from_numpy(diagonal)
            torch.testing.assert_close(inputs, expected, rtol=1e-3, atol=1e-4)


def test_the_hooks_are_gone_afterwards(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    before = model(TOKENS).logits
    online = {tiny.architecture.layer_path(0, "mlp.down_proj"): OnlineTransform(32)}
    by_path(tiny, model, online)
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("role", ["self_attn.o_proj", "mlp.down_proj"])
def test_half_the_mean_square_is_the_divergence_of_a_small_error(role, tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    tokens = torch.randint(0, 320, (64, 40), generator=torch.Generator().manual_seed(2))
    seen = by_path(tiny, model, tokens=tokens)
    loss = HeldOutLoss(model, tiny.architecture.layers, tokens)
    path = tiny.architecture.layer_path(2, role)
    weight = tiny.weights[f"{path}.weight"]
    error = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * weight.std() * 0.05
    inputs, gradients = seen[path]
    predicted = float(((inputs @ error.t()) * gradients).sum(-1).square().mean()) / 2
    replace_weights(model, tiny.architecture, {f"{path}.weight": weight + error})
    assert predicted == pytest.approx(loss(), rel=0.2)


def _rotation(size, columns):
    """The block Hadamard matrix `[columns, columns]`, orthogonal and symmetric."""
    return online_hadamard(torch.eye(columns), size)
