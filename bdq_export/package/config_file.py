"""`bdq_config.json`: every option of an export under the flags' own words; `--config` reads it back.

Works for any dataclass of plain values, so an option added to `ExportOptions` is in the file without a change here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

from bdq_export.errors import InvalidInputError
from bdq_export.options import ExportOptions
from bdq_export.package.side_files import to_json

Options = TypeVar("Options")
NAME = "bdq_config.json"
_SIZE_LIMIT = 1 << 20


def dump_config(options: Any) -> bytes:
    """The file's content for a dataclass of options.

    An absolute path keeps only its last part, since the file is published with the model; give such a file again on
    the command line beside `--config`.
    """
    return to_json({field.name: _plain(getattr(options, field.name)) for field in dataclasses.fields(options)})


def load_config(path: Path) -> ExportOptions:
    """The export options in `path`; see `load_options`."""
    return load_options(path, ExportOptions)


def load_options(path: Path, kind: type[Options]) -> Options:
    """Options of type `kind` from a file that `dump_config` wrote or a user did; a missing key takes its default.

    Raises:
        InvalidInputError: no such file, not a JSON object, a key twice, an unknown key, or a value of a wrong type.
        UsageError: a value that `kind` itself refuses.
    """
    content = _read_object(path)
    hints = typing.get_type_hints(kind)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(typing.cast(Any, kind)) if field.init}
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise InvalidInputError(f"{path.name}: unknown key {key!r}; {hint}")
    return kind(**{key: _convert(path.name, key, value, fields[key]) for key, value in content.items()})


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InvalidInputError(f"no configuration file {path}; check the path given to --config")
    if path.stat().st_size > _SIZE_LIMIT:
        raise InvalidInputError(f"{path} has more than {_SIZE_LIMIT} bytes, so it is no configuration file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise InvalidInputError(f"{path.name}: key {key!r} is given twice; keep one")
        return dict(pairs)

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{path} holds a {type(content).__name__}, expected a JSON object of options")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return PureWindowsPath(value).name
    return value


def _convert(file: str, key: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` says: str, int, float, bool, a tuple of one of them, or an optional one."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        choices = typing.get_args(hint)
        if value is None and type(None) in choices:
            return None
        hint = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise InvalidInputError(f"{file}: {key!r} is {value!r}, expected a list")
        return tuple(_convert(file, key, item, typing.get_args(hint)[0]) for item in value)
    # bool is an int to Python, and an int is welcome where a float is meant
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not right:
        raise InvalidInputError(f"{file}: {key!r} is {value!r}, expected {hint.__name__}")
    return value
