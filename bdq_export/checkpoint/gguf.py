"""A `.gguf` file as a Hugging Face folder: float32 safetensors, config, tokenizer, chat template."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from bdq_export.checkpoint.gguf_config import make_config, make_generation_config
from bdq_export.checkpoint.gguf_file import GgufFile, read_gguf
from bdq_export.checkpoint.gguf_tokenizer import make_tokenizer, make_tokenizer_config
from bdq_export.checkpoint.gguf_weights import write_safetensors
from bdq_export.errors import InvalidInputError, ResourceError, UnsupportedModelError
from bdq_models.gguf_families import GGUF_FAMILIES


def convert_gguf(gguf: Path, directory: Path) -> Path:
    """Convert `gguf` into the new folder `directory`; nothing is left behind if it fails.

    Memory stays at a few rows of a tensor and the vocabulary. Quantized weights are dequantized: the result is what
    the file computes, not what the model was before it was quantized.

    Args:
        gguf: a llama or gemma3 model.
        directory: must not exist yet, or be empty; its parent must exist.

    Returns:
        `directory`.

    Raises:
        InvalidInputError: no GGUF file, a damaged one, or `directory` is taken.
        UnsupportedModelError: a family, or a variant of it, that is not supported.
        ResourceError: the disk is full.
    """
    source = read_gguf(gguf)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InvalidInputError(f"{directory} exists and is not empty; remove it or choose another folder")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise InvalidInputError(f"{directory} cannot be made: {error.strerror}: {directory.parent}") from None
    try:
        _write(source, temporary)
        temporary.chmod(0o755)
        if directory.exists():
            directory.rmdir()  # empty; Windows does not replace a folder
        os.replace(temporary, directory)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        kind = ResourceError if full else InvalidInputError
        raise kind(f"writing {directory} failed: {error.strerror}; choose a folder on another disk") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def convert_once(gguf: Path, work_dir: Path) -> Path:
    """The converted folder of `gguf` in `work_dir`; a finished conversion of the same file is used again.

    Raises:
        InvalidInputError: see `convert_gguf`.
    """
    if not gguf.is_file():
        raise InvalidInputError(f"{gguf} is no regular file; expected a .gguf file")
    try:
        with gguf.open("rb") as file:
            digest = hashlib.sha256(f"{gguf.stat().st_size}".encode())
            digest.update(file.read(1 << 24))
        work_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"{gguf} cannot be converted into {work_dir}: {error.strerror}") from None
    directory = work_dir / f"{gguf.stem}-{digest.hexdigest()[:12]}"
    if directory.is_dir():
        return directory
    return convert_gguf(gguf, directory)


def _write(source: GgufFile, directory: Path) -> None:
    name = source.metadata.get("general.architecture")
    family = GGUF_FAMILIES.get(name) if isinstance(name, str) else None
    if family is None or not isinstance(name, str):
        raise UnsupportedModelError(
            f"{source.path.name} has general.architecture {name!r}; supported in GGUF: {', '.join(GGUF_FAMILIES)}; "
            "for another family give its safetensors folder"
        )
    config = make_config(source, family, name)
    tokenizer = make_tokenizer(source)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    write_safetensors(source, family, heads, directory / "model.safetensors")
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", make_generation_config(source))
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(directory / "tokenizer_config.json", make_tokenizer_config(source, config["max_position_embeddings"]))
    template = source.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
