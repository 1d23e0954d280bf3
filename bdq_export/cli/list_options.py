"""Options that take several values in a row: `--seeds 0 1 2` is `--seeds 0 --seeds 1 --seeds 2`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand

LISTS = ("--schemes", "--methods", "--seeds", "--tasks")


class ListOptionsCommand(TyperCommand):
    """A command whose `LISTS` end at the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's, after the lists are written out."""
        return super().parse_args(ctx, written_out(args, LISTS))


def written_out(arguments: Sequence[str], lists: Collection[str]) -> list[str]:
    """`arguments` with the name of a list in front of each of its values; behind `--` nothing is changed."""
    result: list[str] = []
    name: str | None = None
    values = 0
    for place, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[place:]]
        if argument.startswith("-"):
            name, values = (argument, 0) if argument in lists else (None, 0)
        elif name is not None:
            values += 1
            if values > 1:
                result.append(name)
        result.append(argument)
    return result
