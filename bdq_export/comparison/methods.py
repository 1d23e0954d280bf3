"""Methods of quantization as sets of export options: what has rivals, and the parts of BDQ one by one.

    bdq-learned+loss=rce+loss_target=label      a method with options of `bdq export` changed
    bdq+calib=c\\+\\+.txt                      a + inside of a value; as \\, a comma in a list of methods

Nothing is learned unless the method says so.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions, parse_block_size

_SET_BY_COMPARE = ("scheme", "seed", "min_top1")


@dataclass(frozen=True)
class Method:
    """A named way to quantize.

    Attributes:
        name: as rows show it.
        about: what it is.
        transform: of `ExportOptions`, as the others below.
        weights: how they are rounded.
        effort: what is learned.
        activation_clip: None searches the clip of each site.
        changes: more options.
    """

    name: str
    about: str
    transform: str
    weights: str = "gptq"
    effort: str = "fast"
    activation_clip: float | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def options(self, scheme: str, seed: int, shared: Mapping[str, Any]) -> ExportOptions:
        """Options of its export.

        Args:
            scheme: bits.
            seed: of every random choice.
            shared: how all exports of a comparison calibrate, if they do; the method's own options win.

        Raises:
            UsageError: the options refuse each other.
        """
        own = {
            "transform": self.transform,
            "weights": self.weights,
            "effort": self.effort,
            "activation_clip": self.activation_clip,
        }
        # Every file is measured, however bad it is.
        given = {**own, **self.changes, "scheme": scheme, "seed": seed, "min_top1": 0.0}
        alone = ExportOptions(**given)
        return ExportOptions(**{**shared, **given}) if alone.calibrates else alone


_ALL = (
    Method("rtn", "no transform, round to nearest", "none", "rtn"),
    Method("gptq", "no transform, GPTQ", "none"),
    Method("smooth", "SmoothQuant's factors, GPTQ", "smooth"),
    Method("hadamard", "QuaRot: random Hadamard rotations, GPTQ, searched clips", "hadamard"),
    Method("hadamard-rtn", "the same, round to nearest", "hadamard", "rtn"),
    Method("hadamard-clip0.9", "QuaRot with one clip of activations for all sites", "hadamard", activation_clip=0.9),
    Method("spin", "SpinQuant: the same with R1 and R2 learned by Cayley SGD before GPTQ", "spin"),
    Method("flatquant", "FlatQuant: Kronecker transforms and clips learned block by block, GPTQ", "kronecker"),
    Method("bdq-plain", "diagonals in closed form and no rotation at all", "bdq-plain"),
    Method("diag-none", "online rotations without the diagonals around them", "diag-none"),
    Method("diag-before", "one diagonal, in front of each online rotation", "diag-before"),
    Method("diag", "one diagonal, behind each online rotation", "diag"),
    Method("bdq", "two diagonals in closed form, one on each side of the rotation", "bdq"),
    Method("bdq-rtn", "the same, round to nearest", "bdq", "rtn"),
    Method("bdq-noclip", "the same with GPTQ and without clips", "bdq", activation_clip=1.0),
    Method("bdq-learned", "bdq, then diagonals, scales and clips learned end to end", "bdq", effort="standard"),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ALL}
DEFAULT = ("rtn", "gptq", "smooth", "hadamard", "spin", "diag-before", "diag", "bdq", "bdq-learned")


def split_list(texts: Sequence[str]) -> list[str]:
    """The parts between commas of each of `texts`; a comma behind a backslash is none, and stays as it is."""
    return [part for text in texts for part in re.split(r"(?<!\\),", text) if part]


def parse_method(text: str) -> Method:
    """The method that `NAME[+option=value ...]` names, called by all of `text`.

    Raises:
        UsageError: an unknown name or option, or a value of a wrong type.
    """
    name, *changes = re.split(r"(?<!\\)\+", text)
    if name not in METHODS:
        raise UsageError(
            f"method {name!r} is unknown, expected one of {', '.join(METHODS)}; write \\, for a comma inside of a value"
        )
    found = METHODS[name]
    return replace(found, name=text, changes=dict(_change(text, change) for change in changes)) if changes else found


def _change(method: str, text: str) -> tuple[str, Any]:
    name, separator, value = re.sub(r"\\([+,])", r"\1", text).partition("=")
    name = name.replace("-", "_")
    hints = typing.get_type_hints(ExportOptions)
    known = [each.name for each in fields(ExportOptions) if each.name not in _SET_BY_COMPARE]
    if not separator or name not in known:
        raise UsageError(
            f"method {method!r}: {text!r} is not OPTION=VALUE with OPTION one of {', '.join(known)}; "
            "write \\+ for a + inside of a value"
        )
    if name == "block_size" and value == "channel":
        return name, parse_block_size(value)
    try:
        return name, _value(hints[name], value)
    except ValueError:
        raise UsageError(f"method {method!r}: {name} is {value!r}, expected {_shown(hints[name])}") from None


def _value(hint: Any, text: str) -> Any:
    """`text` as the type `hint`; "none" where that may be None."""
    if isinstance(hint, types.UnionType):
        if text == "none":
            return None
        hint = next(choice for choice in typing.get_args(hint) if choice is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        return tuple(text.split(","))
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return hint(text)


def _shown(hint: Any) -> str:
    return "true or false" if hint is bool else str(getattr(hint, "__name__", hint))
