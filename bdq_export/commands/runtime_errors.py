"""What `bdq_runtime` raises, as errors with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bdq_export.errors import InvalidInputError, UsageError


@contextmanager
def invalid_input() -> Iterator[None]:
    """Turn a ValueError, or a file that cannot be read, into an InvalidInputError with the same text."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidInputError(str(error)) from None


def require_at_least(name: str, value: int | None, least: int) -> None:
    """Refuse an option below `least`; None passes.

    Raises:
        UsageError: the value is too small.
    """
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}, expected at least {least}")
