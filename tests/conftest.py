"""Tiny random models of every supported family, as config.json and canonical weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from bdq_models import Architecture, Dimensions, get_architecture

# A busy machine must not fail a test: no example has a time limit.
settings.register_profile("bdq", deadline=None)
settings.load_profile("bdq")


def pytest_collection_finish() -> None:
    """Garbage collections, of which exports of tiny models have many, need not walk through all of torch each time."""
    gc.collect()
    gc.freeze()


SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILIES: dict[str, dict[str, Any]] = {
    # SmolLM2's proportions: 9 query heads on 3, hidden size 16 * 9, tied.
    "llama": {
        "model_type": "llama",
        "hidden_size": 144,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama3": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE},
    "llama_biases": {
        "model_type": "llama",
        "hidden_size": 96,
        "num_attention_heads": 6,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "phi3": {"model_type": "phi3", "partial_rotary_factor": 0.75},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_key_value_heads": 1,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class TinyModel:
    """What a checkpoint knows of a model, and its canonical weights."""

    config: dict[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    weights: dict[str, Any]


def tiny_config(family: str, **changes: Any) -> dict[str, Any]:
    """The config.json of a tiny model of `family`, a key of `FAMILIES`."""
    config = {**SIZES, **FAMILIES[family], **changes}
    classes = {"gemma3_text": "Gemma3ForCausalLM"}
    model_type = config["model_type"]
    config["architectures"] = [classes.get(model_type, f"{model_type.capitalize()}ForCausalLM")]
    return config


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, Any]:
    """Weights large enough that attention is not uniform; gains and biases random too. float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from bdq_export.float_model import transformers_config

    description = TinyModel(config, get_architecture(config), Dimensions.from_config(config), {})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(description, untied=False))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 2 and "embed" not in name:
            values *= 1.5 / parameter.shape[1] ** 0.5
        elif "norm" in name:
            offset = description.architecture.norm_offset
            values = values.mul(0.3).exp() - offset
        weights[name] = values
    return weights


def _unpack(architecture: Architecture, dimensions: Dimensions, weights: dict[str, Any]) -> dict[str, Any]:
    from bdq_models import split_rows

    canonical = dict(weights)
    for packed, _ in architecture.packed:
        for layer in range(dimensions.layers):
            rows = canonical.pop(f"{architecture.layer_path(layer, packed)}.weight")
            for part, start, stop in split_rows(architecture, dimensions, packed):
                canonical[f"{architecture.layer_path(layer, part)}.weight"] = rows[start:stop].clone()
    return canonical


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., TinyModel]:
    """Make a tiny random model: `tiny_model(family, seed=0, **config changes)`, float32."""

    def make(family: str, seed: int = 0, **changes: Any) -> TinyModel:
        config = tiny_config(family, **changes)
        architecture, dimensions = get_architecture(config), Dimensions.from_config(config)
        weights = _unpack(architecture, dimensions, _random_weights(config, seed))
        return TinyModel(config, architecture, dimensions, weights)

    return make


@pytest.fixture(scope="session")
def make_tiny_config() -> Callable[..., dict[str, Any]]:
    """Make the config.json of a tiny model: `make_tiny_config(family, **changes)`."""
    return tiny_config


@pytest.fixture(scope="session")
def write_model(tiny_model: Callable[..., TinyModel]) -> Callable[..., Path]:
    """Write a whole model folder: `write_model(directory, family="llama", dtype=None, **config changes) -> Path`."""
    from byte_tokenizer import write_tokenizer
    from safetensors.torch import save_file

    from bdq_export.checkpoint import to_checkpoint_names

    def write(directory: Path, family: str = "llama", dtype: Any = None, **changes: Any) -> Path:
        tiny = tiny_model(family, **changes)
        directory.mkdir()
        stored = to_checkpoint_names(tiny.architecture, tiny.weights)
        save_file(
            {name: value.to(dtype or value.dtype) for name, value in stored.items()}, directory / "model.safetensors"
        )
        (directory / "config.json").write_text(json.dumps(tiny.config))
        write_tokenizer(directory)
        return directory

    return write


@pytest.fixture
def model_dir(tmp_path: Path, write_model: Callable[..., Path]) -> Callable[..., Path]:
    """Write a whole model folder: `model_dir(family="llama", dtype=None, **config changes) -> Path`."""

    def make(family: str = "llama", dtype: Any = None, **changes: Any) -> Path:
        return write_model(tmp_path / "model", family, dtype, **changes)

    return make
