"""The contract of a pass: from one graph level to another, each with a verifier."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from bdq_passes.levels import Level, verify


class GraphPass(ir.passes.InPlacePass):
    """A named pass from one graph level to another; the levels are its pre- and postcondition.

    Subclasses are frozen dataclasses whose fields are the options of the pass.
    """

    name: ClassVar[str]
    takes: ClassVar[Level]
    gives: ClassVar[Level]

    def requires(self, model: ir.Model) -> None:
        """Raise when the model is not at level `takes`."""
        verify(model, self.takes)

    def ensures(self, model: ir.Model) -> None:
        """Raise when the model is not at level `gives`."""
        verify(model, self.gives)
