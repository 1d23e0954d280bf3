"""From the graph of a builder to the normal form: see `normalize`."""

from __future__ import annotations

from bdq_export.builders.normalize.normal_form import normalize

__all__ = ["normalize"]
