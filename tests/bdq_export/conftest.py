"""A toy decoder with a KV cache, small enough to write by hand, and its folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from bdq_export.checkpoint import Checkpoint
from bdq_models import Dimensions, get_architecture

VOCAB, HIDDEN = 320, 64


def _toy_weights(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32), rng.normal(size=(HIDDEN, VOCAB)).astype(np.float32)


def _toy_model(embedding: np.ndarray, head: np.ndarray) -> ir.Model:
    """logits = embedding[ids] @ head; the cache grows by the embeddings and is read by nobody."""
    past = [
        helper.make_tensor_value_info(f"past_key_values.0.{kind}", TensorProto.FLOAT, [1, 1, "past", HIDDEN])
        for kind in ("key", "value")
    ]
    present = [
        helper.make_tensor_value_info(f"present.0.{kind}", TensorProto.FLOAT, [1, 1, "total", HIDDEN])
        for kind in ("key", "value")
    ]
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "sequence"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, [1, "total"]),
        *past,
    ]
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "head"], ["logits"]),
        helper.make_node("Unsqueeze", ["hidden", "axis"], ["row"]),
        helper.make_node("Concat", ["past_key_values.0.key", "row"], ["present.0.key"], axis=2),
        helper.make_node("Concat", ["past_key_values.0.value", "row"], ["present.0.value"], axis=2),
    ]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "sequence", VOCAB])
    initializers = [
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.arange(4099, dtype=np.uint8), "odd_bytes"),
        numpy_helper.from_array(embedding, "embedding"),
        numpy_helper.from_array(head, "head"),
    ]
    graph = helper.make_graph(nodes, "toy", inputs, [logits, *present], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model)


@pytest.fixture
def toy_weights() -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
    """Make (embedding `[V, H]`, head `[H, V]`) from a seed."""
    return _toy_weights


@pytest.fixture
def toy_model() -> Callable[[np.ndarray, np.ndarray], ir.Model]:
    """Make the toy decoder of an embedding and a head."""
    return _toy_model


@pytest.fixture
def toy_checkpoint(tmp_path: Path, make_tiny_config: Callable[..., dict[str, Any]]) -> Checkpoint:
    """A checkpoint's folder with everything but weights; tokenizer_config.json has what must be cleaned."""
    directory = tmp_path / "source"
    directory.mkdir()
    config = {**make_tiny_config("llama"), "_name_or_path": "/home/someone/models/secret"}
    contents = {
        "config.json": json.dumps(config),
        "generation_config.json": json.dumps({"eos_token_id": 2, "temperature": 0.7}),
        "tokenizer.json": json.dumps({"added_tokens": [{"id": 5, "content": "<end>"}]}),
        "tokenizer_config.json": json.dumps({"eos_token": "<end>", "model_max_length": 1e30}),
        "chat_template.jinja": "{{ messages }}\r\n",
        "README.md": "---\nlicense: apache-2.0\n---\n# source\n",
    }
    for name, text in contents.items():
        (directory / name).write_bytes(text.encode())
    tokenizer = tuple(directory / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    generation = json.loads(contents["generation_config.json"])
    architecture, dimensions = get_architecture(config), Dimensions.from_config(config)
    return Checkpoint(directory, config, generation, architecture, dimensions, tokenizer, "ab" * 32, {})
