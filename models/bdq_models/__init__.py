"""Model families as data: module paths by role, and the edges where scales and rotations cancel."""

from __future__ import annotations

from bdq_models.architecture import Architecture, Builder, Edge, Side, Tie
from bdq_models.dimensions import Dimensions, split_rows
from bdq_models.families import get_architecture, supported

__all__ = [
    "Architecture",
    "Builder",
    "Dimensions",
    "Edge",
    "Side",
    "Tie",
    "get_architecture",
    "split_rows",
    "supported",
]
