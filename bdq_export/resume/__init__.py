"""Progress of a calibration on disk: what is finished is read back after a kill, in order, and never computed twice."""

from __future__ import annotations

from bdq_export.resume.record import Record
from bdq_export.resume.store import NOWHERE, ProgressStore, open_store

__all__ = ["NOWHERE", "ProgressStore", "Record", "open_store"]
