"""The tokenizer files of a model folder: present, sane, and fitting the model's vocabulary."""

from __future__ import annotations

from pathlib import Path

from bdq_export.checkpoint.containment import regular_file
from bdq_export.checkpoint.json_file import read_json_object
from bdq_export.errors import InvalidInputError

MAX_TOKENIZER_BYTES = 256_000_000
MAX_SIDE_BYTES = 16_000_000
TOKENIZER = "tokenizer.json"
_JSON_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
_TEXT_SIDE_FILES = ("chat_template.jinja",)


def find_tokenizer_files(directory: Path, vocab_size: int) -> tuple[Path, ...]:
    """`tokenizer.json` and the files that go with it, each checked.

    Args:
        directory: the model folder.
        vocab_size: rows of the embedding; a token id must be below it.

    Raises:
        InvalidInputError: no tokenizer.json (says how to make one), a file that is too large or malformed, or a
            token without a row in the embedding.
    """
    if not (directory / TOKENIZER).is_symlink() and not (directory / TOKENIZER).exists():
        raise InvalidInputError(_why_no_tokenizer(directory))
    path = regular_file(directory, TOKENIZER)
    _check_tokenizer(path, vocab_size)
    files = [path]
    for name in _JSON_SIDE_FILES + _TEXT_SIDE_FILES:
        if (directory / name).exists() or (directory / name).is_symlink():
            files.append(regular_file(directory, name))
            if name in _JSON_SIDE_FILES:
                _check_side_file(files[-1])
            elif files[-1].stat().st_size > MAX_SIDE_BYTES:
                raise InvalidInputError(f"{name} is larger than {MAX_SIDE_BYTES} bytes; it is no chat template")
    return tuple(files)


def _check_side_file(path: Path) -> None:
    fields = read_json_object(path, path.name, MAX_SIDE_BYTES)
    if path.name == "tokenizer_config.json" and "auto_map" in fields:
        raise InvalidInputError(
            "tokenizer_config.json asks for code from the model folder (auto_map), which is never run; "
            "save the tokenizer again with transformers' own fast class"
        )


def _check_tokenizer(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer

    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise InvalidInputError(f"{TOKENIZER} is larger than {MAX_TOKENIZER_BYTES} bytes; it is no tokenizer")
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # tokenizers raises plain Exception
        raise InvalidInputError(f"{TOKENIZER} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    ids = tokenizer.get_vocab(with_added_tokens=True).values()
    largest = max(ids, default=-1)
    if largest < 0:
        raise InvalidInputError(f"{TOKENIZER} has no tokens; expected up to {vocab_size}")
    if largest >= vocab_size:
        raise InvalidInputError(
            f"{TOKENIZER} has token id {largest} but the model has {vocab_size} embedding rows; "
            "it belongs to another model, or tokens were added without resizing the embedding"
        )


def _why_no_tokenizer(directory: Path) -> str:
    slow = [name for name in ("tokenizer.model", "spiece.model", "vocab.json") if (directory / name).exists()]
    found = f"only {slow[0]}" if slow else "no tokenizer"
    return (
        f"{directory} has {found}, but {TOKENIZER} is needed; copy it from the model's repository or make it with "
        "transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )
