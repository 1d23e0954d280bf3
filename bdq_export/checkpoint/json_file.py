"""JSON from an untrusted folder: size, encoding, nesting, duplicate keys and NaN literals are checked."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from bdq_export.errors import InvalidInputError

MAX_NESTING = 64


def parse_json_object(raw: bytes, what: str) -> dict[str, Any]:
    """Parse `raw` as one JSON object.

    Args:
        raw: UTF-8 text.
        what: how an error message names the text.

    Raises:
        InvalidInputError: not UTF-8, a byte-order mark, not JSON, not an object, a duplicate key, a NaN or
            Infinity literal, or nested deeper than `MAX_NESTING`.
    """
    if raw.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InvalidInputError(f"{what} starts with a byte-order mark; save it as plain UTF-8")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InvalidInputError(f"{what} has the key {repeated[:80]!r} twice; every key must be unique")
        return found

    def refuse_constant(literal: str) -> float:
        raise InvalidInputError(f"{what} holds the literal {literal}, which is not JSON; use a finite number")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse_constant)
    except RecursionError:
        raise InvalidInputError(f"{what} is nested deeper than {MAX_NESTING} levels") from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{what} is not UTF-8 text (byte {error.start})") from None
    except ValueError as error:
        raise InvalidInputError(f"{what} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(value, dict):
        raise InvalidInputError(f"{what} is a JSON {type(value).__name__}; expected an object")
    _check_nesting(value, what)
    return value


def read_json_object(path: Path, what: str, max_bytes: int) -> dict[str, Any]:
    """Read the JSON object in the regular file `path`.

    Raises:
        InvalidInputError: unreadable, empty, larger than `max_bytes`, or see `parse_json_object`.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise InvalidInputError(f"{what} has {size} bytes; at most {max_bytes} are read")
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{what} cannot be read: {error.strerror}") from error
    if not raw.strip():
        raise InvalidInputError(f"{what} is empty; expected a JSON object")
    return parse_json_object(raw, what)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _check_nesting(value: Any, what: str) -> None:
    """Refuse more than `MAX_NESTING` levels; iterative, so that it cannot overflow the stack itself."""
    level = [value]
    for _ in range(MAX_NESTING):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise InvalidInputError(f"{what} is nested deeper than {MAX_NESTING} levels")
