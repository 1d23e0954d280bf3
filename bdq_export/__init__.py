"""Export Hugging Face LLMs to calibrated low-bit ONNX models that run on ONNX Runtime.

Each verb of the command line is a function here, with the same words:

    from bdq_export import export, evaluate, run, bench, inspect
    result = export("SmolLM2-135M", "out.onnx", scheme="w4a16")

Nothing heavy is imported before a function is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bdq_export.commands.bench import bench
    from bdq_export.commands.compare import CompareResult, compare
    from bdq_export.commands.evaluate import evaluate
    from bdq_export.commands.export import ExportResult, export
    from bdq_export.commands.fetch import fetch
    from bdq_export.commands.inspect import inspect
    from bdq_export.commands.run import run
    from bdq_export.options import ExportOptions
    from bdq_export.scheme import QuantScheme

_HOMES = {
    "CompareResult": "bdq_export.commands.compare",
    "ExportOptions": "bdq_export.options",
    "ExportResult": "bdq_export.commands.export",
    "QuantScheme": "bdq_export.scheme",
    "bench": "bdq_export.commands.bench",
    "compare": "bdq_export.commands.compare",
    "evaluate": "bdq_export.commands.evaluate",
    "export": "bdq_export.commands.export",
    "fetch": "bdq_export.commands.fetch",
    "inspect": "bdq_export.commands.inspect",
    "run": "bdq_export.commands.run",
}

__all__ = [
    "CompareResult",
    "ExportOptions",
    "ExportResult",
    "QuantScheme",
    "bench",
    "compare",
    "evaluate",
    "export",
    "fetch",
    "inspect",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value  # a submodule of the same name must not shadow the function later
        return value
    raise AttributeError(f"module 'bdq_export' has no attribute {name!r}")
