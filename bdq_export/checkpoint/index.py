"""Which safetensors files of a model folder hold which tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bdq_export.checkpoint.containment import plain_file_name, regular_file
from bdq_export.checkpoint.json_file import read_json_object
from bdq_export.checkpoint.safetensors_header import TensorEntry, read_header
from bdq_export.errors import InvalidInputError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 50_000_000
MAX_SHARDS = 1000
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def weight_files(directory: Path) -> dict[Path, dict[str, TensorEntry]]:
    """The safetensors files of the model in `directory` with their validated headers, in name order.

    As transformers does, `model.safetensors` is taken before `model.safetensors.index.json`.

    Raises:
        InvalidInputError: none there (pickles and adapters are named and explained), a shard is missing or
            unsafe, or the index does not agree with the shards.
    """
    names = {entry.name for entry in directory.iterdir()}
    if SINGLE_NAME in names:
        path = regular_file(directory, SINGLE_NAME)
        return {path: read_header(path)}
    if INDEX_NAME in names:
        return _sharded(directory)
    raise InvalidInputError(_why_no_weights(directory, names))


def _sharded(directory: Path) -> dict[Path, dict[str, TensorEntry]]:
    index = read_json_object(regular_file(directory, INDEX_NAME), INDEX_NAME, MAX_INDEX_BYTES)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidInputError(f"{INDEX_NAME} has no weight_map object; download the model again")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        shards.setdefault(plain_file_name(name, INDEX_NAME), set()).add(tensor)
    if len(shards) > MAX_SHARDS:
        raise InvalidInputError(f"{INDEX_NAME} names {len(shards)} files; at most {MAX_SHARDS} are read")
    others = sorted(name for name in shards if not name.endswith(".safetensors"))
    if others:
        raise InvalidInputError(f"{INDEX_NAME} names {others[0]!r}; only .safetensors files are read")
    files = {}
    for name in sorted(shards):
        path = regular_file(directory, name)
        files[path] = read_header(path)
        _check_agreement(name, mapped=shards[name], stored=set(files[path]))
    return files


def _check_agreement(name: str, mapped: set[str], stored: set[str]) -> None:
    if mapped == stored:
        return
    tensor = min(mapped ^ stored)
    fault = "does not hold it" if tensor in mapped else "holds it but the index does not say so"
    raise InvalidInputError(
        f"{INDEX_NAME} and {name} disagree about tensor {tensor[:80]!r}: the file {fault}; download the model again"
    )


def _why_no_weights(directory: Path, names: Iterable[str]) -> str:
    """Explain the absence of `model.safetensors` by what is there instead."""
    names = sorted(names)
    pickles = [name for name in names if name.endswith(_PICKLES)]
    safetensors = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if "adapter_config.json" in names:
        return f"{directory} is a LoRA adapter, not a model; merge it into its base model and save that as safetensors"
    if pickles:
        return (
            f"{directory} has weights only as pickle ({pickles[0]}), which can run code when loaded; "
            "save the model with save_pretrained(..., safe_serialization=True)"
        )
    if ggufs:
        return f"{directory} has no safetensors; to export {ggufs[0]}, give the path of that file"
    if safetensors:
        return f"{directory} has {safetensors[0]} but no {INDEX_NAME}; download the model again"
    return f"{directory} has neither {SINGLE_NAME} nor {INDEX_NAME}; expected a Hugging Face model folder"
