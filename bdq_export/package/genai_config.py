"""`genai_config.json`: what onnxruntime-genai needs to open the output folder as it is.

Its parser throws at a key that it does not know, so nothing of this project's goes in here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bdq_export.errors import InvalidInputError
from bdq_models import Dimensions

MAX_LENGTH = 4096
"""Cap of the default `max_length`: genai allocates the whole cache of that length when generation starts."""

_TYPES = {
    "gemma3_text": "gemma3_text",
    "llama": "llama",
    "mistral": "mistral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
_GENERIC_TYPE = "decoder"
"""genai's type for a decoder that it knows nothing else of."""
_SEARCH = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the special tokens; `eos` holds every token that ends an answer."""

    bos: int
    eos: tuple[int, ...]
    pad: int


def special_tokens(
    config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer_eos: int | None
) -> SpecialTokens:
    """Special tokens by generation_config.json, then config.json, then the tokenizer.

    Args:
        config: config.json.
        generation: generation_config.json, or empty.
        tokenizer_eos: id of the tokenizer's eos token: a chat model's end of turn, often missing in config.json.

    Raises:
        InvalidInputError: no end-of-sequence token anywhere.
    """

    def ids(key: str) -> tuple[int, ...]:
        for source in (generation, config):
            value = source.get(key)
            if value is not None:
                return tuple(int(item) for item in (value if isinstance(value, list) else [value]))
        return ()

    eos = ids("eos_token_id")
    if tokenizer_eos is not None and tokenizer_eos not in eos:
        eos = (*eos, tokenizer_eos)
    if not eos:
        raise InvalidInputError(
            "no eos_token_id in config.json, generation_config.json or the tokenizer, so generation would never "
            "stop; add it to config.json"
        )
    bos, pad = ids("bos_token_id"), ids("pad_token_id")
    # genai's own builder writes 1 for a missing bos; its parser wants one number for pad, never a list
    return SpecialTokens(bos[0] if bos else 1, eos, pad[0] if pad else eos[0])


def genai_config(
    family: str,
    dimensions: Dimensions,
    tokens: SpecialTokens,
    generation: Mapping[str, Any],
    onnx_name: str,
    inputs: Collection[str],
    custom_ops_library: str | None = None,
) -> dict[str, Any]:
    """The content of `genai_config.json`.

    A family with a sliding window needs no key for it: each GroupQueryAttention node carries its own
    `local_window_size`, and the cache keeps all positions.

    Args:
        family: `Architecture.name`.
        dimensions: sizes of the decoder.
        tokens: special tokens.
        generation: generation_config.json, or empty; its search settings become the defaults.
        onnx_name: file name of the model.
        inputs: input names of the graph; `position_ids` is listed only when the graph has it.
        custom_ops_library: bare file name of an op library in the same folder; a missing one makes genai refuse.

    Raises:
        ValueError: `custom_ops_library` is not a bare file name.
    """
    session: dict[str, Any] = {"log_id": "onnxruntime-genai", "provider_options": []}
    if custom_ops_library is not None:
        if "/" in custom_ops_library or "\\" in custom_ops_library:
            raise ValueError(f"{custom_ops_library!r} is a path, expected a bare file name")
        session["custom_ops_library"] = custom_ops_library
    return {
        "model": {
            "bos_token_id": tokens.bos,
            "context_length": dimensions.context_length,
            "decoder": {
                "session_options": session,
                "filename": onnx_name,
                "head_size": dimensions.head_dim,
                "hidden_size": dimensions.hidden_size,
                "inputs": _inputs(inputs),
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": dimensions.heads,
                "num_hidden_layers": dimensions.layers,
                "num_key_value_heads": dimensions.kv_heads,
            },
            "eos_token_id": tokens.eos[0] if len(tokens.eos) == 1 else list(tokens.eos),
            "pad_token_id": tokens.pad,
            "type": _TYPES.get(family, _GENERIC_TYPE),
            "vocab_size": dimensions.vocab_size,
        },
        "search": {
            **{key: _setting(generation.get(key), value) for key, value in _SEARCH.items()},
            "early_stopping": True,
            "max_length": min(dimensions.context_length, MAX_LENGTH),
            "min_length": 0,
            "past_present_share_buffer": True,
        },
    }


def _inputs(names: Collection[str]) -> dict[str, str]:
    plain = [name for name in ("input_ids", "attention_mask", "position_ids") if name in names]
    return {
        **{name: name for name in plain},
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }


def _setting(value: Any, default: float | bool) -> Any:
    """A value of generation_config.json where it is of the right kind, else genai's default."""
    if isinstance(default, bool):
        return value if isinstance(value, bool) else default
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
