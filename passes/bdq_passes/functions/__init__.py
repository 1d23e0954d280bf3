"""Function bodies of standard operators for the `bdq` nodes of a model, so that any runtime can execute it."""

from bdq_passes.functions.library import attach_functions, functions_for

__all__ = ["attach_functions", "functions_for"]
