"""The commands `bdq` and `bdq-export`: flags to functions, results to stdout, errors to exit codes."""

from bdq_export.cli.main import main, main_export

__all__ = ["main", "main_export"]
