"""Every supported family: the graph of its builder computes what torch computes and is in the normal form."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from bdq_export.builders import Builder, build_float_graph, check_float_graph
from bdq_export.float_model import load_float_model
from bdq_passes import annotations as note
from bdq_passes.annotate_linears import AnnotateLinearsPass

PREFILL, STEPS = 30, 10
LARGEST_ERROR = 1e-4
FOREIGN = (b"site-packages", b"bdq-config-", b".py", b"stack_trace", b"pkg.", tempfile.gettempdir().encode())
WEIGHT = re.compile(r"model\.")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama3": ("llama3", {}),
    "llama-biases": ("llama_biases", {}),
    "mistral-window": ("mistral", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "phi3-partial-rotary": ("phi3", WIDE_HEADS | {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3-window": ("phi3", {"partial_rotary_factor": 1.0, "sliding_window": 8}),
    "gemma3": ("gemma3", {}),
}


@pytest.fixture(scope="module", params=list(MODELS))
def tiny(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    """Each of the tiny models in turn."""
    family, changes = MODELS[request.param]
    return tiny_model(family, **changes)


@pytest.fixture(scope="module")
def graph(tiny: Any) -> ir.Model:
    """Its float graph; to be cloned by who changes it."""
    return build_float_graph(tiny, tiny.weights)


def run(path: Path, tokens: npt.NDArray[np.int64], prefill: int) -> npt.NDArray[np.float32]:
    """Logits of all positions: a prefill and then one token at a time."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batch = tokens.shape[0]
    cache = {
        value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    logits = []
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, tokens.shape[1]))]:
        feeds = {"input_ids": tokens[:, start:end], "attention_mask": np.ones((batch, end), np.int64)}
        results = dict(zip(names, session.run(None, {**feeds, **cache}), strict=True))
        logits.append(results.pop("logits"))
        cache = {name.replace("present.", "past_key_values."): value for name, value in results.items()}
    return np.concatenate(logits, axis=1)


def relative_error(tiny: Any, path: Path) -> float:
    """Largest difference to torch over all positions of two rows, in standard deviations of the logits."""
    tokens = np.random.default_rng(1).integers(0, tiny.dimensions.vocab_size, (2, PREFILL + STEPS))
    with torch.no_grad():
        expected = load_float_model(tiny, tiny.weights)(torch.from_numpy(tokens)).logits.numpy()
    return float(np.abs(run(path, tokens, PREFILL) - expected).max() / expected.std())


def save(model: ir.Model, folder: Path) -> Path:
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def test_graph_of_every_family_equals_torch(tiny: Any, graph: ir.Model, tmp_path: Path) -> None:
    assert relative_error(tiny, save(graph, tmp_path)) < LARGEST_ERROR
    torch_model = load_float_model(tiny, tiny.weights)
    assert check_float_graph(graph, torch_model, tiny.dimensions, seed=3) < LARGEST_ERROR
    assert check_float_graph(tmp_path / "model.onnx", torch_model, tiny.dimensions) < LARGEST_ERROR


def test_graph_of_every_family_is_in_the_normal_form(tiny: Any, graph: ir.Model) -> None:
    model = graph.clone()
    architecture, dimensions = tiny.architecture, tiny.dimensions
    linears = {node.name: node for node in model.graph if note.parts(node)}
    assert {node.op_type for node in linears.values()} == {"MatMul"}
    expected = {f"model.layers.{i}.{path}" for i in range(dimensions.layers) for path in architecture.linears}
    parts = [part for node in linears.values() for part in note.parts(node)]
    assert sorted(parts) == sorted([*expected, "lm_head"])
    for name, node in linears.items():
        weight = node.inputs[1]
        assert weight is not None
        assert weight.name == f"{name}.weight"
        assert weight.const_value is not None
        stored = "model.embed_tokens" if note.tied(node) else None
        rows = [tiny.weights[f"{stored or part}.weight"].numpy() for part in note.parts(node)]
        np.testing.assert_array_equal(weight.const_value.numpy(), np.concatenate(rows).T)
    AnnotateLinearsPass(expected=len(linears))(model)
    assert [note.role(node) for node in model.graph if node.name == "model.embed_tokens"] == [note.EMBEDDING]
    allowed = {"RMSNormalization", "SkipSimplifiedLayerNormalization", "GroupQueryAttention", "MatMul"}
    assert allowed <= {node.op_type for node in model.graph}
    assert not {"Transpose", "Concat", "Constant", "Identity", "Expand"} & {node.op_type for node in model.graph}
    assert len({node.name for node in model.graph}) == len(list(model.graph))
    text = ir.to_proto(model).SerializeToString()
    assert not [word for word in FOREIGN if word in text]


def test_interface_names_and_dimensions(tiny_model: Any) -> None:
    tiny = tiny_model("qwen3")
    graph = build_float_graph(tiny, tiny.weights).graph
    shapes = {str(value.name): str(value.shape) for value in (*graph.inputs, *graph.outputs)}
    caches = [f"{layer}.{leaf}" for layer in range(3) for leaf in ("key", "value")]
    assert list(shapes) == [
        *("input_ids", "attention_mask", *(f"past_key_values.{name}" for name in caches)),
        *("logits", *(f"present.{name}" for name in caches)),
    ]
    assert shapes["input_ids"] == "[batch,sequence]"
    assert shapes["attention_mask"] == "[batch,total]"
    assert shapes["past_key_values.1.key"] == "[batch,2,past,32]"
    assert shapes["present.2.value"] == "[batch,2,total,32]"
    assert shapes["logits"] == "[batch,sequence,320]"


@pytest.mark.parametrize("name", ["llama", "phi3-partial-rotary"])
def test_builders_agree(tiny_model: Any, tmp_path: Path, name: str) -> None:
    tiny = tiny_model(MODELS[name][0], **MODELS[name][1])
    traced, constructed = (build_float_graph(tiny, tiny.weights, builder=builder) for builder in reversed(Builder))
    assert relative_error(tiny, save(traced, tmp_path)) < LARGEST_ERROR
    assert sorted(map(signature, traced.graph)) == sorted(map(signature, constructed.graph))
    names = [
        {name for name in model.graph.initializers if name.startswith("model.")} for model in (traced, constructed)
    ]
    assert names[0] == names[1]


def signature(node: ir.Node) -> tuple[str, ...]:
    """What both builders must agree on: the operator, the name of what has weights, and what it is made of."""
    weighted = any(value is not None and str(value.name).endswith(".weight") for value in node.inputs)
    return (node.op_type, str(node.name) if weighted else "", *note.parts(node))
