"""Files that travel with the model: tokenizer, config.json, generation_config.json, genai_config.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from bdq_export.errors import InvalidInputError
from bdq_export.package.genai_config import genai_config, special_tokens

if TYPE_CHECKING:
    from bdq_export.checkpoint import Checkpoint

SIZE_LIMIT = 256 << 20
"""A tokenizer file above this is refused; the largest real ones are about 40 MB."""
_LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt")
_PATH_KEYS = ("_name_or_path", "name_or_path")


def side_files(
    checkpoint: Checkpoint, onnx_name: str, inputs: Collection[str], custom_ops_library: str | None = None
) -> dict[str, bytes]:
    """Content of the side files by name.

    Files are copied as bytes, except where tokenizer_config.json states a `model_max_length` beyond the context
    (transformers' 1e30 breaks JSON parsers), or a file names a folder of the machine that it was made on, or
    config.json names code to run.

    Args:
        checkpoint: of the source model.
        onnx_name: file name of the model.
        inputs: input names of the graph.
        custom_ops_library: file name of the op library beside the model; None where there is none.

    Raises:
        InvalidInputError: a file is not readable as what its name says, or far too big.
    """
    directory, generation = checkpoint.directory, checkpoint.generation_config
    files = {path.name: _read(path) for path in checkpoint.tokenizer_files}
    if "tokenizer_config.json" in files:
        raw = files["tokenizer_config.json"]
        files["tokenizer_config.json"] = clean_tokenizer_config(raw, checkpoint.dimensions.context_length)
    files["config.json"] = _cleaned(_read(directory / "config.json"), checkpoint.config)
    if generation:
        files["generation_config.json"] = _cleaned(_read(directory / "generation_config.json"), generation)
    for name in _LICENCES:
        if (directory / name).is_file() and not (directory / name).is_symlink():
            files[name] = _read(directory / name)
    tokens = special_tokens(checkpoint.config, generation, _tokenizer_eos(files))
    family, dimensions = checkpoint.architecture.name, checkpoint.dimensions
    genai = genai_config(family, dimensions, tokens, generation, onnx_name, inputs, custom_ops_library)
    files["genai_config.json"] = to_json(genai)
    return files


def clean_tokenizer_config(raw: bytes, context_length: int) -> bytes:
    """tokenizer_config.json with `model_max_length` at most `context_length`, and no local path in it.

    Raises:
        InvalidInputError: it is no JSON object.
    """
    content = _parse("tokenizer_config.json", raw)
    longest = content.get("model_max_length")
    if isinstance(longest, int | float) and longest > context_length:
        content = {**content, "model_max_length": context_length}
    return _cleaned(raw, content)


def to_json(content: Any) -> bytes:
    """Indented JSON with a final newline; the same content gives the same bytes."""
    return (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _tokenizer_eos(files: Mapping[str, bytes]) -> int | None:
    """Id of the eos token that tokenizer_config.json names, looked up among tokenizer.json's added tokens."""
    if "tokenizer_config.json" not in files or "tokenizer.json" not in files:
        return None
    named = _parse("tokenizer_config.json", files["tokenizer_config.json"]).get("eos_token")
    text = named.get("content") if isinstance(named, dict) else named
    for token in _parse("tokenizer.json", files["tokenizer.json"]).get("added_tokens") or []:
        if text is not None and token.get("content") == text:
            return int(token["id"])
    return None


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise InvalidInputError(f"{path} is missing or no plain file; the export needs it beside the model")
    size = path.stat().st_size
    if size > SIZE_LIMIT:
        raise InvalidInputError(f"{path} has {size} bytes, expected at most {SIZE_LIMIT}")
    return path.read_bytes()


def _parse(name: str, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{name} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{name} holds a {type(content).__name__}, expected a JSON object")
    return content


def _cleaned(raw: bytes, content: Mapping[str, Any]) -> bytes:
    """`raw` as it is where it says just what `content` says without local paths, else `content` anew."""
    wanted = _drop_paths(content)
    return raw if _parse("side file", raw) == wanted else to_json(wanted)


def _drop_paths(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _PATH_KEYS or not _is_local(value)}


def _is_local(value: Any) -> bool:
    """Whether a string is a path rather than a hub id such as `org/name`."""
    if not isinstance(value, str):
        return False
    absolute = PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()
    return absolute or value.startswith((".", "~")) or value.count("/") > 1 or "\\" in value
