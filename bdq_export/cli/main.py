"""Entry points; nothing heavy is imported before a command runs, so that `--help` is quick."""

from __future__ import annotations

import gc
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from bdq_export.cli.compare_command import compare_command
from bdq_export.cli.export_command import export_command
from bdq_export.cli.fetch_command import fetch_command
from bdq_export.cli.list_options import ListOptionsCommand
from bdq_export.cli.lm_eval_command import PASS_THROUGH, lm_eval_command
from bdq_export.cli.model_commands import bench_command, eval_command, inspect_command, run_command
from bdq_export.errors import EXIT_INTERRUPTED, BdqError, PeerFailedError, UsageError
from bdq_export.system_errors import resource_errors

_EPILOG = (
    "Exit codes: 0 ok, 1 unexpected, 2 usage, 3 unsupported model, 4 invalid or unsafe input file, "
    "5 not enough RAM or disk, 6 verification below threshold (files kept, marked), "
    "7 missing optional package, 130 interrupted."
)
_LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


# Typer carries its own copy of click since 0.2x and depended on click before: take the class from where it is.
_ClickException: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


def _application() -> typer.Typer:
    app = typer.Typer(
        name="bdq",
        help="Export LLMs to calibrated low-bit ONNX models, and run, measure and inspect them.",
        no_args_is_help=True,
        add_completion=False,
        epilog=_EPILOG,
    )
    app.command("export", epilog=_EPILOG)(export_command)
    app.command("eval", epilog=_EPILOG)(eval_command)
    app.command("compare", cls=ListOptionsCommand, epilog=_EPILOG)(compare_command)
    app.command("lm-eval", context_settings=PASS_THROUGH)(lm_eval_command)
    app.command("run", epilog=_EPILOG)(run_command)
    app.command("bench", epilog=_EPILOG)(bench_command)
    app.command("inspect", epilog=_EPILOG)(inspect_command)
    app.command("fetch", epilog=_EPILOG)(fetch_command)
    app.callback()(_version_callback)
    return app


def _export_application() -> typer.Typer:
    app = typer.Typer(name="bdq-export", add_completion=False)
    app.command(epilog=_EPILOG, no_args_is_help=True)(export_command)
    return app


def _print_version(value: bool) -> None:
    if value:
        from bdq_export import __version__

        typer.echo(f"bdq-export {__version__}")
        raise typer.Exit


def _version_callback(
    version: bool = typer.Option(
        False, "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    """Export LLMs to calibrated low-bit ONNX models, and run, measure and inspect them."""


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _log_level() -> str:
    """What BDQ_LOG_LEVEL asks for.

    Raises:
        UsageError: no such level.
    """
    given = os.environ.get("BDQ_LOG_LEVEL") or "warning"
    if given.lower() not in _LOG_LEVELS:
        raise UsageError(f"BDQ_LOG_LEVEL is {given!r}, expected one of {', '.join(_LOG_LEVELS)}")
    return given.upper()


def _run(app: typer.Typer, arguments: Sequence[str] | None) -> int:
    # Importing torch and transformers makes millions of objects that stay: collecting every 700 of them takes a fifth
    # of the time of a quick export.
    gc.set_threshold(100_000, 50, 50)
    command = typer.main.get_command(app)
    try:
        logging.basicConfig(level=_log_level(), stream=sys.stderr)
        with resource_errors():
            result = command.main(args=arguments, standalone_mode=False)
        if result == EXIT_INTERRUPTED:  # typer has caught the KeyboardInterrupt and says nothing
            raise KeyboardInterrupt
    except PeerFailedError as error:
        return error.exit_code
    except BdqError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted; nothing unfinished was written", EXIT_INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except _ClickException as error:
        if not error.format_message():  # type: ignore[attr-defined]
            return UsageError.exit_code  # no arguments: the help has been printed
        return _fail(f"{error.format_message()} (see --help)", UsageError.exit_code)  # type: ignore[attr-defined]
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        if os.environ.get("BDQ_LOG_LEVEL", "").upper() == "DEBUG":
            raise
        return _fail(f"unexpected {type(error).__name__}: {error} (set BDQ_LOG_LEVEL=debug for the traceback)", 1)
    return result if isinstance(result, int) else 0


def _leave(code: int) -> NoReturn:
    # What is alive now dies with the process: a last collection of it all would take a second.
    gc.freeze()
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `bdq`; leaves with one of the documented exit codes."""
    _leave(_run(_application(), arguments))


def main_export(arguments: Sequence[str] | None = None) -> None:
    """Run `bdq-export`, which is `bdq export`."""
    _leave(_run(_export_application(), arguments))
