"""config.json of an untrusted model folder: what may be in it, before any value of it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bdq_export.checkpoint.json_file import read_json_object
from bdq_export.errors import InvalidInputError, UnsupportedModelError
from bdq_models import Architecture, Dimensions, get_architecture, supported

MAX_CONFIG_BYTES = 4_000_000
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies that are constants of the model; `dynamic` and `longrope` depend on the length of the input."""

_SIZE_CAPS = {
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 28,
    "original_max_position_embeddings": 1 << 28,
    "sliding_window": 1 << 28,
}
_MAY_BE_NULL = ("sliding_window", "head_dim", "num_key_value_heads", "original_max_position_embeddings")
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window", "is_encoder_decoder")
_FRACTIONS = ("rms_norm_eps", "partial_rotary_factor")
_MULTIMODAL = ("vision_config", "audio_config", "text_config", "vision_tower", "mm_vision_tower")
_CHOOSES_CODE = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
"""Keys that make transformers pick, or even download, a kernel: never taken from a model folder."""


def read_config(path: Path) -> dict[str, Any]:
    """Read and check config.json; keys that choose code to run are left out of the result.

    Raises:
        InvalidInputError: no JSON object, or a value of a wrong type or out of range.
        UnsupportedModelError: encoder-decoder, multimodal, remote code, already quantized, or a kind of RoPE
            that cannot be exported.
    """
    config = read_json_object(path, "config.json", MAX_CONFIG_BYTES)
    _refuse_unsupported(config)
    for key, cap in _SIZE_CAPS.items():
        _check_size(config, key, cap)
    for key in _BOOLEANS:
        if not isinstance(config.get(key, False), bool):
            raise InvalidInputError(f"config.json: {key} is {_shown(config[key])}; expected true or false")
    for key in _FRACTIONS:
        if config.get(key) is not None:
            _check_number(config[key], key, 0.0, 1.0)
    _check_rope(config)
    _check_token_ids(config)
    return {key: value for key, value in config.items() if key not in _CHOOSES_CODE}


def resolve_model(config: Mapping[str, Any]) -> tuple[Architecture, Dimensions]:
    """The family and the sizes of a checked config.

    Raises:
        UnsupportedModelError: unknown family; names the supported ones.
        InvalidInputError: sizes that are missing or do not divide as they must.
    """
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InvalidInputError(f"config.json: architectures is {_shown(classes)}; expected a list of class names")
    if not isinstance(config.get("model_type", ""), str):
        raise InvalidInputError(f"config.json: model_type is {_shown(config['model_type'])}; expected a string")
    try:
        architecture = get_architecture(config)
    except LookupError as error:
        raise UnsupportedModelError(f"config.json: {error.args[0]}") from None
    try:
        dimensions = Dimensions.from_config(config)
    except ValueError as error:
        raise InvalidInputError(str(error)) from None
    if not config.get("head_dim") and dimensions.hidden_size % dimensions.heads:
        raise InvalidInputError(
            f"config.json: hidden_size {dimensions.hidden_size} is no multiple of "
            f"num_attention_heads {dimensions.heads} and head_dim is not given"
        )
    return architecture, dimensions


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuse whole kinds of model, most telling reason first."""
    if "auto_map" in config or config.get("trust_remote_code"):
        raise UnsupportedModelError(
            "config.json asks for code from the model folder (auto_map, trust_remote_code), which is never run; "
            f"supported without it: {', '.join(supported())}"
        )
    quantization = config.get("quantization_config", config.get("compression_config"))
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise UnsupportedModelError(
            f"config.json: the checkpoint is already quantized (quant_method {_shown(method)}); "
            "export from the original float checkpoint"
        )
    if config.get("is_encoder_decoder") is True:
        raise UnsupportedModelError(
            f"config.json: model_type {_shown(config.get('model_type'))} is an encoder-decoder; "
            f"only decoder models are supported: {', '.join(supported())}"
        )
    parts = [key for key in _MULTIMODAL if config.get(key) is not None]
    if parts:
        raise UnsupportedModelError(
            f"config.json has {', '.join(parts)}: a multimodal model; "
            f"only text decoders are supported: {', '.join(supported())}"
        )


def _check_size(config: Mapping[str, Any], key: str, cap: int) -> None:
    value = config.get(key)
    if key not in config or (value is None and key in _MAY_BE_NULL):
        return
    if type(value) is not int or not 1 <= value <= cap:
        raise InvalidInputError(f"config.json: {key} is {_shown(value)}; expected an integer from 1 to {cap}")


def _check_number(value: Any, key: str, low: float, high: float) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or not low < value <= high:
        raise InvalidInputError(f"config.json: {key} is {_shown(value)}; expected a number in ({low:g}, {high:g}]")


def _check_rope(config: Mapping[str, Any]) -> None:
    for key in ("rope_theta", "rope_local_base_freq"):
        if config.get(key) is not None:
            _check_number(config[key], key, 0.0, 1e12)
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise InvalidInputError(f"config.json: {key} is {_shown(value)}; expected an object or null")
        nested = {name: item for name, item in value.items() if isinstance(item, dict)}
        for where, item in nested.items() if nested else [("", value)]:
            _check_rope_entry(item, f"{key}.{where}" if where else key)


def _check_rope_entry(value: Mapping[str, Any], where: str) -> None:
    kind = value.get("rope_type", value.get("type", "default"))
    if kind not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"config.json: {where} has type {_shown(kind)}; supported: {', '.join(_ROPE_TYPES)}"
        )
    for name in ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"):
        if value.get(name) is not None:
            _check_number(value[name], f"{where}.{name}", 0.0, 1e12)


def _check_token_ids(config: Mapping[str, Any]) -> None:
    vocab_size = config.get("vocab_size")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = config.get(key)
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            # transformers itself writes -1 for "none".
            if type(token) is not int or not -1 <= token < (vocab_size or 1 << 22):
                raise InvalidInputError(
                    f"config.json: {key} is {_shown(value)}; expected token ids below vocab_size {vocab_size}"
                )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
