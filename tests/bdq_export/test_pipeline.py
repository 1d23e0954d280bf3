"""Every scheme becomes a graph that stock ONNX Runtime runs, and the op library computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from bdq_export.builders import build_float_graph
from bdq_export.errors import VerificationError
from bdq_export.fake_quant import FakeQuantization, fake_quantized
from bdq_export.float_model import load_float_model
from bdq_export.options import ExportOptions
from bdq_export.pipeline import quantize_graph
from bdq_export.quantization import Quantization
from bdq_export.quantize.rtn import rtn
from bdq_export.quantize.sequential import set_quantized
from bdq_export.quantize.specs import end_specs, linear_specs
from bdq_export.scheme import FLOAT_BITS, QuantScheme
from bdq_export.transform.channels import consumer_channels
from bdq_export.transform.kronecker import factor_sizes, random_kronecker
from bdq_models import Side
from bdq_runtime.library import LibraryError, library_path
from bdq_runtime.session import numpy_type
from bdq_runtime.specs import ActivationQuantization, KVQuantization, OnlineTransform, StaticKVQuantization

FAMILIES = ("llama", "llama3", "llama_biases", "mistral", "qwen2", "qwen3", "phi3", "gemma3")
NORMS = ("qwen3", "gemma3")
"""Families with norms on queries and keys: q, k and v come apart before attention."""
SCHEMES = ("w4a4kv4", "w3a3kv3", "w2a4", "w4a8 bdq", "w4a16 bdq", "w16a4", "w3a16", "w4a16kv8", "w8a8kv4", "w16a16kv3")
TOKENS = np.arange(5, 17)


@pytest.fixture(scope="module")
def float_graph(tiny_model: Callable[..., Any]) -> Callable[[str], tuple[Any, ir.Model]]:
    """A tiny model and a float graph of its own for each call."""
    made: dict[str, tuple[Any, Any]] = {}

    def make(family: str) -> tuple[Any, ir.Model]:
        if family not in made:
            # GroupQueryAttention rotates a multiple of 16 channels; a head of the tiny model has 16
            tiny = tiny_model(family, **({"partial_rotary_factor": 1.0} if family == "phi3" else {}))
            made[family] = tiny, ir.to_proto(build_float_graph(tiny, tiny.weights))
        tiny, proto = made[family]
        return tiny, ir.from_proto(proto)

    return make


def _decided(tiny: Any, options: ExportOptions) -> Quantization:
    """Weights rounded to nearest, clips of 0.9, and a Hadamard transform in front of down_proj and of keys."""
    architecture, dimensions, scheme = tiny.architecture, tiny.dimensions, QuantScheme.parse(options.scheme)
    tied = f"{architecture.lm_head}.weight" not in tiny.weights
    layers = range(dimensions.layers)
    paths = [architecture.layer_path(layer, path) for layer in layers for path in architecture.linears]
    specs = {f"{path}.weight": linear_specs(options)(path) for path in paths}
    specs |= end_specs(options, architecture, dimensions, tied)
    weights = {name: rtn(tiny.weights[name], spec) for name, spec in specs.items() if spec is not None}
    activations = {}
    if options.is_per_token:
        activations = dict.fromkeys(paths, ActivationQuantization(scheme.activation_bits, 0.9))
        activations[architecture.lm_head] = ActivationQuantization(8)
    diagonal = np.linspace(0.9, 1.1, dimensions.intermediate_size).astype(np.float32)
    down = [path for path in paths if path.endswith("down_proj")]
    online = {path: OnlineTransform(32, diagonal) for path in down} if options.is_per_token else {}
    cache = KVQuantization(scheme.kv_bits, scheme.kv_bits, 0.9, 0.9, hadamard=True)
    kv = {layer: cache for layer in layers if scheme.kv_bits != FLOAT_BITS}
    return Quantization(weights, {}, activations, online, kv)


def _quantized(float_graph: Any, family: str, scheme: str) -> ir.Model:
    tiny, model = float_graph(family)
    name, _, ops = scheme.partition(" ")
    options = ExportOptions(scheme=name, ops=ops or "auto", accuracy_level=4)
    quantize_graph(model, tiny.architecture, tiny.dimensions, _decided(tiny, options), options)
    return model


def _session(model: ir.Model, library: bool = False) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _logits(session: ort.InferenceSession, steps: int) -> Any:
    """Logits of every token, from `_run`."""
    return _run(session, steps)[0]


def _run(session: ort.InferenceSession, steps: int) -> tuple[Any, dict[str, Any]]:
    """Logits of every token, and the cache: all tokens but `steps` in one run, the others one by one."""
    cache = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), numpy_type(value.type))
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    names = [value.name for value in session.get_outputs()]
    found, done = [], 0
    for count in (len(TOKENS) - steps, *[1] * steps):
        total = done + count
        feeds = {
            "input_ids": TOKENS[None, done:total],
            "attention_mask": np.ones((1, total), np.int64),
            "logits_to_keep": np.array(0),
            **cache,
        }
        results = dict(zip(names, session.run(None, feeds), strict=True))
        found.append(results["logits"][0])
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
        done = total
    return np.concatenate(found), cache


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_prompt_and_its_tokens_one_by_one_give_the_same(float_graph: Any, scheme: str) -> None:
    session = _session(_quantized(float_graph, "llama", scheme))
    (one, cache), (other, other_cache) = _run(session, 4), _run(session, len(TOKENS) - 1)
    # ONNX Runtime adds in another order for one row than for several, which may turn a value that lies between two
    # codes (which ones depends on the processor); a random model makes much of it, layer by layer.
    for kind in ("key", "value"):
        name = f"past_key_values.0.{kind}"
        if cache[name].dtype == np.uint8:
            assert (cache[name] != other_cache[name]).sum() <= 2
    errors = np.linalg.norm(one - other, axis=-1) / np.linalg.norm(one, axis=-1)
    assert errors[0] < 1e-5
    assert errors.max() < 0.1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["w8a8kv8 bdq", "w4a4kv4"])
def test_the_library_computes_what_the_functions_compute(float_graph: Any, family: str, scheme: str) -> None:
    try:
        library_path()
    except LibraryError as error:
        pytest.skip(str(error))
    model = _quantized(float_graph, family, scheme)
    (found, cache), (expected, expected_cache) = _run(_session(model, library=True), 4), _run(_session(model), 4)
    # Up to here every operation is exact; behind the first attention, a sum in another order may turn a value that lies
    # between two codes, and a random model makes much of it.
    for kind in ("key", "value"):
        name = f"past_key_values.0.{kind}"
        np.testing.assert_array_equal(cache[name], expected_cache[name])
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_8_bits_of_everything_are_near_the_float_model(float_graph: Any, family: str) -> None:
    tiny, model = float_graph(family)
    options = ExportOptions(scheme="w8a8kv8", ops="bdq")
    decided = _decided(tiny, options)
    whole = KVQuantization(8, 8, hadamard=True)
    activations = dict.fromkeys(decided.activations, ActivationQuantization(8))
    decided = replace(decided, activations=activations, online={}, kv=dict.fromkeys(decided.kv, whole))
    quantize_graph(model, tiny.architecture, tiny.dimensions, decided, options)
    plain = ExportOptions(scheme="w16a16")
    _, reference = float_graph(family)
    quantize_graph(reference, tiny.architecture, tiny.dimensions, _decided(tiny, plain), plain)
    found, expected = _logits(_session(model), 4), _logits(_session(reference), 4)
    assert np.abs(found - expected).max() < 0.35 * expected.std()


@pytest.mark.parametrize("family", FAMILIES)
def test_operators_are_fused_in_every_family(float_graph: Any, family: str) -> None:
    model = _quantized(float_graph, family, "w4a4kv4")
    found = Counter(node.op_type for node in model.graph if node.domain == "bdq")
    packed = "" if family in NORMS else "Packed"
    kinds = Counter(name.removesuffix("Bias") for name in found.elements())
    assert kinds == {
        "LowBitLinear": 3 * 2 + 1,  # q, k and v are one
        "GatedLowBitLinear": 3,
        "HadamardLowBitLinear": 3,
        f"{packed}RotaryKVAttention": 3,
    }
    stock = Counter(node.op_type for node in model.graph)
    assert not {"MatMul", "MatMulNBits", "Sigmoid", "Gelu"} & set(stock)
    assert stock["Split"] == (3 if family in NORMS else 0)
    assert all(
        str(node.name).startswith("model.layers.") or node.name == "lm_head"
        for node in model.graph
        if node.domain == "bdq"
    )
    assert {(item.domain, item.name) for item in model.functions.values()} == {("bdq", name) for name in found}


def _static(tiny: Any, bits: int, **options: Any) -> tuple[Quantization, ExportOptions]:
    """Weights rounded to nearest, and static scales of channels, each another one, that clip some values."""
    given = ExportOptions(**{"scheme": f"w8a16kv{bits}", "kv_scales": "static", **options})
    decided = _decided(tiny, given)
    random = np.random.default_rng(3)
    shape = (tiny.dimensions.kv_heads, tiny.dimensions.head_dim)
    scales = (random.uniform(0.5, 2.0, (2, *shape)) * 2 / (1 << (bits - 1))).astype(np.float32)
    kv = dict.fromkeys(decided.kv, StaticKVQuantization(bits, *scales))
    return replace(decided, kv=kv), given


def _torch_logits(tiny: Any, decided: Quantization) -> Any:
    torch_model = load_float_model(tiny, tiny.weights)
    set_quantized(torch_model, tiny.architecture, decided.weights)
    quantization = FakeQuantization(decided.activations, decided.online, decided.kv)
    with torch.no_grad(), fake_quantized(torch_model, tiny.architecture, tiny.dimensions, quantization):
        return torch_model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()


def _static_errors(
    float_graph: Any, family: str, bits: int, change: float = 1.0, steps: int = 0, **options: Any
) -> Any:
    """Largest logit differences of tokens, in standard deviations, between a graph and torch.

    Args:
        change: of the scales of keys in the graph, and not in torch.
        steps: tokens that are fed one by one.
    """
    tiny, model = float_graph(family)
    decided, given = _static(tiny, bits, **options)
    expected = _torch_logits(tiny, decided)
    changed = {
        layer: replace(cache, key_scales=cache.key_scales * np.float32(change))
        for layer, cache in decided.static_caches.items()
    }
    quantize_graph(model, tiny.architecture, tiny.dimensions, replace(decided, kv=changed), given)
    assert not {node.op_type for node in model.graph if node.domain == "bdq"}
    return np.abs(_logits(_session(model), steps) - expected).max(-1) / expected.std()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bits", "steps"), [(8, 0), (4, 4)])
def test_stock_operators_compute_a_static_cache_as_torch_does(
    float_graph: Any, family: str, bits: int, steps: int
) -> None:
    errors = _static_errors(float_graph, family, bits, steps=steps, accuracy_level=4, scheme=f"w16a16kv{bits}")
    # A value between two codes may be rounded to the other one, which the tokens that attend to it see.
    assert np.median(errors) < 1e-4
    assert errors.max() < (0.02 if bits == 8 else 0.3)


@pytest.mark.parametrize("bits", [4, 8])
def test_another_static_scale_is_seen(float_graph: Any, bits: int) -> None:
    errors = _static_errors(float_graph, "llama", bits, change=1.01, scheme=f"w16a16kv{bits}")
    assert np.median(errors) > 1e-3


@pytest.mark.parametrize(("bits", "kind", "channels"), [(8, "tensor(int8)", 16), (4, "tensor(uint8)", 8)])
def test_a_static_cache_has_the_type_of_its_operator(float_graph: Any, bits: int, kind: str, channels: int) -> None:
    tiny, model = float_graph("llama")
    decided, options = _static(tiny, bits)
    quantize_graph(model, tiny.architecture, tiny.dimensions, decided, options)
    session = _session(model)
    values = [*session.get_inputs(), *session.get_outputs()]
    cache = [value for value in values if value.name.startswith(("past", "present"))]
    assert len(cache) == 2 * 2 * 3
    assert {(value.type, value.shape[1], value.shape[3]) for value in cache} == {
        (kind, tiny.dimensions.kv_heads, channels)
    }


def test_stock_linears_go_with_a_quantized_cache(float_graph: Any) -> None:
    model = _quantized(float_graph, "llama", "w4a16kv4")
    found = Counter(node.op_type for node in model.graph)
    # 3 layers: qkv, o, gate and up, down; lm_head
    assert (found["MatMulNBits"], found["PackedRotaryKVAttention"]) == (13, 3)
    assert {node.op_type for node in model.graph if node.domain == "bdq"} == {"PackedRotaryKVAttention"}


def test_float_weights_get_rounded_inputs(float_graph: Any) -> None:
    model = _quantized(float_graph, "llama", "w16a4")
    found = Counter(node.op_type for node in model.graph)
    assert found["DynamicFakeQuantize"] == 13  # qkv, o, gate with up, down of 3 layers; lm_head
    assert "LowBitLinear" not in found


def test_parts_that_differ_are_an_error(float_graph: Any) -> None:
    tiny, model = float_graph("llama")
    options = ExportOptions(scheme="w4a4")
    decided = _decided(tiny, options)
    path = "model.layers.1.self_attn.k_proj"
    decided = replace(decided, activations={**decided.activations, path: ActivationQuantization(8)})
    with pytest.raises(VerificationError, match="qkv_proj differ in what is done to their input"):
        quantize_graph(model, tiny.architecture, tiny.dimensions, decided, options)


def test_linears_of_a_node_whose_inputs_take_turns_otherwise_are_an_error(float_graph: Any) -> None:
    tiny, model = float_graph("llama")
    options = ExportOptions(scheme="w4a4")
    decided = _decided(tiny, options)
    paths = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    turns = {path: OnlineTransform(16, interleave=1 + path.endswith("k_proj")) for path in paths}
    decided = replace(decided, online={**decided.online, **turns})
    with pytest.raises(VerificationError, match="qkv_proj differ in what is done to their input"):
        quantize_graph(model, tiny.architecture, tiny.dimensions, decided, options)


def test_what_has_no_node_is_an_error(float_graph: Any) -> None:
    tiny, model = float_graph("llama")
    options = ExportOptions(scheme="w4a4")
    decided = _decided(tiny, options)
    decided = replace(decided, online={**decided.online, "model.layers.9.mlp.down_proj": OnlineTransform(32)})
    with pytest.raises(VerificationError, match=r"the first is model\.layers\.9"):
        quantize_graph(model, tiny.architecture, tiny.dimensions, decided, options)


@pytest.mark.parametrize("family", ["llama_biases", "phi3", "gemma3"])
@pytest.mark.parametrize("online", ["hadamard", "kronecker"])
def test_the_graph_computes_what_the_fake_quantized_model_does(float_graph: Any, family: str, online: str) -> None:
    """Up to values between two levels, which other orders of summation may round to the other one."""
    tiny, model = float_graph(family)
    options = ExportOptions(scheme="w8a8kv8", ops="bdq")
    decided = _decided(tiny, options)
    generator = torch.Generator().manual_seed(5)
    transforms = {}
    for layer in range(tiny.dimensions.layers):
        for edge in tiny.architecture.edges:
            if edge.consumer_side is Side.INPUT:
                channels = consumer_channels(edge, tiny.dimensions)
                left, right = factor_sizes(channels)
                found = random_kronecker(left, None if edge.name == "value" else right, generator)
                if online == "hadamard":
                    runs = tiny.dimensions.heads if edge.name == "value" else 1
                    found = OnlineTransform(channels & -channels, interleave=runs)
                paths = [tiny.architecture.layer_path(layer, path) for path in edge.consumers]
                transforms.update(dict.fromkeys(paths, found))
    decided = replace(decided, online=transforms)
    torch_model = load_float_model(tiny, tiny.weights)
    set_quantized(torch_model, tiny.architecture, decided.weights)
    quantization = FakeQuantization(decided.activations, decided.online, decided.kv)
    with torch.no_grad(), fake_quantized(torch_model, tiny.architecture, tiny.dimensions, quantization):
        expected = torch_model(torch.from_numpy(TOKENS)[None]).logits[0].numpy()
    quantize_graph(model, tiny.architecture, tiny.dimensions, decided, options)
    found = _logits(_session(model), 0)
    errors = np.abs(found - expected).max(-1) / expected.std()
    # A value between two levels may be rounded to the other one, which the tokens that attend to it see.
    assert errors.min() < 1e-4
    assert errors.max() < 0.1
