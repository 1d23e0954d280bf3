"""What GPTQ measures by: how many tokens, and how outputs of linears are grouped. No torch in here."""

from __future__ import annotations

GPTQ_SEQUENCES = 32
"""Enough: 56 gave no better file (docs/measurements.md, "What rounding by both sides adds")."""
GROUP = 2048
"""Outputs whose errors are weighed together at most; time and memory grow with outputs times group."""


def group_sizes(outputs: int) -> list[int]:
    """Outputs of each group of a linear that has `outputs`."""
    return [min(GROUP, outputs - start) for start in range(0, outputs, GROUP)]
