"""config.json and generation_config.json from the metadata of a GGUF file."""

from __future__ import annotations

from typing import Any

import numpy as np

from bdq_export.checkpoint.gguf_file import GgufFile
from bdq_export.errors import InvalidInputError, UnsupportedModelError
from bdq_models.gguf_families import GgufFamily

_SIZES = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_CHANGES_THE_MODEL = ("rope.scaling", "expert_", "attention.scale", "logit_scale", "embedding_scale", "residual_scale")
_SPECIAL_TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def make_config(gguf: GgufFile, family: GgufFamily, name: str) -> dict[str, Any]:
    """config.json for the model in `gguf`.

    Args:
        gguf: the source.
        family: the row of `name`.
        name: value of `general.architecture`, the prefix of the keys.

    Raises:
        InvalidInputError: a key is missing or of a wrong type.
        UnsupportedModelError: a variant of the family that the conversion would get wrong.
    """
    metadata = gguf.metadata
    refused = tuple(f"{name}.{prefix}" for prefix in _CHANGES_THE_MODEL)
    for key, value in metadata.items():
        if key.startswith(refused) and not (isinstance(value, int | str) and value in (0, "none")):
            raise UnsupportedModelError(
                f"{gguf.path.name} has {key}, which the conversion does not support; give the safetensors folder"
            )
    config: dict[str, Any] = {
        "architectures": [family.architecture.classes[0]],
        "model_type": family.architecture.name,
        **{new: _integer(gguf, f"{name}.{old}") for old, new in _SIZES.items()},
    }
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = _integer(gguf, f"{name}.attention.head_count_kv", heads)
    config["head_dim"] = _integer(gguf, f"{name}.attention.key_length", hidden // heads)
    rotary = _integer(gguf, f"{name}.rope.dimension_count", config["head_dim"])
    if rotary != config["head_dim"]:
        raise UnsupportedModelError(f"{gguf.path.name} rotates {rotary} of {config['head_dim']} channels of a head")
    config["rms_norm_eps"] = _number(gguf, f"{name}.attention.layer_norm_rms_epsilon")
    config["rope_theta"] = _number(gguf, f"{name}.rope.freq_base", 10000.0)
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidInputError(f"{gguf.path.name} has no token_embd.weight; it holds no complete model")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    config.update(family.constants)
    config.update({key: config[source] for key, source in family.copies})
    if family.sliding_pattern:
        config.update(_sliding_window(gguf, name, family.sliding_pattern, config["num_hidden_layers"]))
    config.update(special_token_ids(gguf))
    return config | {"dtype": "float32"}


def make_generation_config(gguf: GgufFile) -> dict[str, Any]:
    """generation_config.json: the special tokens; an end of turn ends the generation too."""
    config: dict[str, Any] = dict(special_token_ids(gguf))
    end_of_turn = gguf.metadata.get("tokenizer.ggml.eot_token_id")
    if type(end_of_turn) is int and end_of_turn != config.get("eos_token_id"):
        config["eos_token_id"] = [config.get("eos_token_id"), end_of_turn]
    return config


def special_token_ids(gguf: GgufFile) -> dict[str, int]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, those that the file has."""
    found = {key: gguf.metadata.get(f"tokenizer.ggml.{old}_token_id") for key, old in _SPECIAL_TOKENS.items()}
    return {key: value for key, value in found.items() if type(value) is int}


def _sliding_window(gguf: GgufFile, name: str, pattern: int, layers: int) -> dict[str, Any]:
    kinds = ["full_attention" if (layer + 1) % pattern == 0 else "sliding_attention" for layer in range(layers)]
    return {"sliding_window": _integer(gguf, f"{name}.attention.sliding_window"), "layer_types": kinds}


def _integer(gguf: GgufFile, key: str, default: int | None = None) -> int:
    value = gguf.metadata.get(key, default)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise InvalidInputError(f"{gguf.path.name}: {key} is {value!r}; expected one positive integer")
    return value


def _number(gguf: GgufFile, key: str, default: float | None = None) -> float:
    value = gguf.metadata.get(key, default)
    if not isinstance(value, float) or not value > 0:
        raise InvalidInputError(f"{gguf.path.name}: {key} is {value!r}; expected a positive number")
    # The file holds float32: the shortest decimal that rounds to it is what the author wrote.
    return float(str(np.float32(value)))
