"""Everything that can go wrong with a run, and the exit code of each.

    BdqError                     1  unexpected
    ├── UsageError               2  a flag or a scheme that cannot be meant
    ├── UnsupportedModelError    3  unknown family, encoder-decoder, remote code
    ├── InvalidInputError        4  missing, malformed or unsafe input file
    ├── ResourceError            5  not enough RAM or disk
    ├── VerificationError        6  the exported model is below the threshold (files kept, marked)
    └── MissingDependencyError   7  optional package or op library missing

A PeerFailedError, of a calibration by several processes, has the code of the process that failed first.
130 is an interrupt (Ctrl-C). A message is one line and names what was found, what was expected and what to do.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_INTERRUPTED = 130


class BdqError(Exception):
    """A run that cannot go on; `exit_code` is what the command returns."""

    exit_code: ClassVar[int] = 1


class UsageError(BdqError):
    """An option, or a combination of options, that cannot be meant."""

    exit_code = 2


class UnsupportedModelError(BdqError):
    """A model that this version cannot export; the message names the supported families."""

    exit_code = 3


class InvalidInputError(BdqError):
    """An input file that is missing, malformed or unsafe."""

    exit_code = 4


class ResourceError(BdqError):
    """Not enough memory or disk, found before the work starts or reported by the system."""

    exit_code = 5


class VerificationError(BdqError):
    """A graph or an exported model that does not compute what it should."""

    exit_code = 6


class MissingDependencyError(BdqError):
    """An optional package, or the op library, is not installed."""

    exit_code = 7


class PeerFailedError(BdqError):
    """Another process of this calibration failed; it has said why, and this one ends silently with the same code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process failed with exit code {code}")
        self.exit_code = code  # type: ignore[misc]


def exit_code_of(error: BaseException) -> int:
    """What the command returns where `error` ends it."""
    if isinstance(error, BdqError):
        return error.exit_code
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else BdqError.exit_code
