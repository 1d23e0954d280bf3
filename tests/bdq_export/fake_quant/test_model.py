"""A fake-quantized transformers model of every family computes what the NumPy reference computes from its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from bdq_export.fake_quant import FakeQuantization, attention, fake_quantized
from bdq_export.float_model import load_float_model, locate_linear, replace_weights
from bdq_export.quantize.rtn import rtn
from bdq_export.transform.channels import consumer_channels
from bdq_models import Side
from bdq_runtime.packing import ODD, PerBlock, PerChannel, QuantSpec
from bdq_runtime.panels import pack_panels, pack_scales
from bdq_runtime.reference.activations import quantize_activations
from bdq_runtime.reference.attention import kv_attention
from bdq_runtime.reference.hadamard import hadamard
from bdq_runtime.reference.linear import low_bit_linear
from bdq_runtime.specs import ActivationQuantization, KVQuantization, OnlineTransform

ALL = ("llama", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
TOKENS = 24
SPEC = QuantSpec(4, PerChannel())


def random_quantization(tiny, seed: int = 0) -> FakeQuantization:
    """Other clips, sizes and diagonals at every site; the linears of a site share theirs."""
    rng = np.random.default_rng(seed)
    architecture, dimensions = tiny.architecture, tiny.dimensions
    activations, online = {}, {}
    for layer in range(dimensions.layers):
        for edge in architecture.edges:
            if edge.consumer_side is Side.INPUT:
                channels = consumer_channels(edge, dimensions)
                transform = OnlineTransform(channels & -channels, np.exp(rng.normal(size=channels)).astype(np.float32))
                activation = ActivationQuantization(int(rng.choice([3, 4, 8])), float(rng.uniform(0.5, 1)))
                for path in edge.consumers:
                    activations[architecture.layer_path(layer, path)] = activation
                    online[architecture.layer_path(layer, path)] = transform
    activations[architecture.lm_head] = ActivationQuantization(8)
    power = dimensions.head_dim & (dimensions.head_dim - 1) == 0
    kv = {
        layer: KVQuantization(*map(int, rng.choice([3, 4, 8], 2)), *rng.uniform(0.7, 1, 2), hadamard=power)
        for layer in range(dimensions.layers)
    }
    return FakeQuantization(activations, online, kv)


@dataclass
class Seen:
    """What went into and came out of the linears and the attention of one forward pass."""

    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    quantized: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    heads: list[tuple[np.ndarray, ...]] = field(default_factory=list)


def observe(tiny, weights, quantization, monkeypatch) -> Seen:
    model = load_float_model(tiny, tiny.weights)
    replace_weights(model, tiny.architecture, {name: torch.from_numpy(w.dequantize()) for name, w in weights.items()})
    seen = Seen()
    names = {locate_linear(tiny.architecture, tiny.dimensions, path).module for path in quantization.activations}

    def before(name):
        return lambda _module, inputs: seen.inputs.__setitem__(name, inputs[0].numpy().copy())

    def after(name):
        def hook(_module, inputs, output):
            seen.quantized[name], seen.outputs[name] = inputs[0].numpy().copy(), output.numpy().copy()

        return hook

    original = attention.quantize_heads

    def record(query, key, value, spec):
        seen.heads.append(tuple(states.numpy().copy() for states in (query, key, value)))
        return original(query, key, value, spec)

    monkeypatch.setattr(attention, "quantize_heads", record)
    tokens = torch.randint(0, tiny.dimensions.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(before(name))
    with torch.no_grad(), fake_quantized(model, tiny.architecture, tiny.dimensions, quantization):
        for name in names:
            model.get_submodule(name).register_forward_hook(after(name))
        model(tokens)
    return seen


def quantized_weights(tiny, spec: QuantSpec = SPEC) -> dict[str, Any]:
    paths = [tiny.architecture.layer_path(layer, path) for layer in range(3) for path in tiny.architecture.linears]
    return {f"{path}.weight": rtn(tiny.weights[f"{path}.weight"], spec) for path in paths}


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize(
    "spec", [SPEC, QuantSpec(2, PerChannel(), grid=ODD), QuantSpec(3, PerBlock(32))], ids=["w4", "odd", "block"]
)
def test_linears(family, spec, tiny_model, monkeypatch):
    tiny = tiny_model(family)
    quantization, weights = random_quantization(tiny), quantized_weights(tiny, spec)
    seen = observe(tiny, weights, quantization, monkeypatch)
    for path, online in quantization.online.items():
        place = locate_linear(tiny.architecture, tiny.dimensions, path)
        activation, weight = quantization.activations[path], weights[f"{path}.weight"]
        x = seen.inputs[place.module]
        codes, step = quantize_activations(
            hadamard(x, online.hadamard_size) * online.diagonal, activation.bits, activation.clip
        )
        assert np.array_equal(seen.quantized[place.module], codes.astype(np.float32) * step), path
        bias = tiny.weights.get(f"{path}.bias")
        expected = low_bit_linear(
            x,
            pack_panels(weight.codes, spec.bits),
            pack_scales(weight.scales),
            n=weight.codes.shape[0],
            weight_bits=spec.bits,
            activation_bits=activation.bits,
            weight_grid=int(spec.grid == ODD),
            block_size=spec.granularity.size if isinstance(spec.granularity, PerBlock) else 0,
            activation_clip=activation.clip,
            bias=None if bias is None else bias.numpy(),
            hadamard_size=online.hadamard_size,
            diagonal=online.diagonal,
        )
        got = seen.outputs[place.module][..., place.start : place.stop]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize("family", ALL)
def test_attention(family, tiny_model, monkeypatch):
    tiny = tiny_model(family)
    quantization = random_quantization(tiny)
    seen = observe(tiny, quantized_weights(tiny), quantization, monkeypatch)
    dimensions = tiny.dimensions
    assert len(seen.heads) == dimensions.layers
    for layer, heads in enumerate(seen.heads):
        spec = quantization.kv[layer]
        query, key, value = (states.transpose(0, 2, 1, 3).reshape(2, TOKENS, -1) for states in heads)
        past = [
            np.zeros((2, dimensions.kv_heads, 0, dimensions.head_dim * bits // 8 + 4), np.uint8)
            for bits in (spec.key_bits, spec.value_bits)
        ]
        expected = kv_attention(
            query,
            key,
            value,
            *past,
            np.full(2, TOKENS - 1, np.int32),
            TOKENS,
            num_heads=dimensions.heads,
            kv_num_heads=dimensions.kv_heads,
            head_size=dimensions.head_dim,
            key_bits=spec.key_bits,
            value_bits=spec.value_bits,
            scale=dimensions.head_dim**-0.5,
            key_clip=spec.key_clip,
            value_clip=spec.value_clip,
            hadamard=int(spec.hadamard),
            local_window_size=window(tiny, layer),
        ).output
        reader = tiny.architecture.layer_path(layer, tiny.architecture.edge("value").consumers[0])
        got = seen.inputs[reader]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))


def window(tiny, layer: int) -> int:
    kinds = tiny.config.get("layer_types")
    if tiny.dimensions.sliding_window is None or (kinds and kinds[layer] == "full_attention"):
        return -1
    return tiny.dimensions.sliding_window


def test_the_context_leaves_nothing_behind(tiny_model):
    tiny = tiny_model("gemma3")
    model = load_float_model(tiny, tiny.weights)
    tokens = torch.arange(TOKENS)[None]
    with torch.no_grad():
        before = model(tokens).logits
        with fake_quantized(model, tiny.architecture, tiny.dimensions, random_quantization(tiny)):
            inside = model(tokens).logits
        assert torch.equal(model(tokens).logits, before)
    assert not torch.allclose(inside, before, atol=1e-3)
    assert model.config._attn_implementation == "sdpa"


def test_decoding_reads_the_rows_that_the_prompt_wrote(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    tokens = torch.randint(0, 320, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), fake_quantized(model, tiny.architecture, tiny.dimensions, random_quantization(tiny)):
        whole = model(tokens).logits
        first = model(tokens[:, :-1], use_cache=True)
        step = model(tokens[:, -1:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=1e-3, atol=1e-3)
