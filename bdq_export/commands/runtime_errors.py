"""What `bdq_runtime` raises, as errors with an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from bdq_export.errors import InvalidInputError, MissingDependencyError, UsageError


@contextmanager
def invalid_input() -> Iterator[None]:
    """Turn what the runtime raises into an error with an exit code and the same text.

    A ValueError, or a file that cannot be read, is an InvalidInputError; a LibraryError is a MissingDependencyError.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidInputError(str(error)) from None
    except RuntimeError as error:
        from bdq_runtime.library import LibraryError

        if isinstance(error, LibraryError):
            raise MissingDependencyError(str(error)) from None
        raise


def require_at_least(name: str, value: int | None, least: int) -> None:
    """Refuse an option below `least`; None passes.

    Raises:
        UsageError: the value is too small.
    """
    if value is not None and value < least:
        raise UsageError(f"{name} is {value}, expected at least {least}")
