"""Let every runtime execute the model: give it function bodies for its `bdq` operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes.functions import attach_functions
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, verify
from bdq_runtime.opset import DOMAIN


@dataclass(frozen=True)
class AttachFunctionsPass(GraphPass):
    """Add a function of standard operators for each operator of the domain `bdq` in the graph.

    A runtime with the op library takes its kernels; any other runs the function. Attributes that a node leaves out are
    written out, since functions have no defaults of their own. A model without such nodes is left alone.

    Requires and ensures `level`, LOWERED unless told otherwise. A second run changes nothing.

    Attributes:
        level: of the graph, before and after.
    """

    name: ClassVar[str] = "attach-functions"
    takes: ClassVar[Level] = Level.LOWERED
    gives: ClassVar[Level] = Level.LOWERED

    level: Level = Level.LOWERED

    def requires(self, model: ir.Model) -> None:
        """Raise when the model is not at `level`."""
        verify(model, self.level)

    def ensures(self, model: ir.Model) -> None:
        """Raise when the model is not at `level`, or a `bdq` node has no function.

        Raises:
            LevelError: see `verify`.
            ValueError: a node without a function.
        """
        verify(model, self.level)
        bodies = {(found.domain, found.name) for found in model.functions.values()}
        for node in model.graph:
            if node.domain == DOMAIN and (node.domain, node.op_type) not in bodies:
                raise ValueError(f"node {node.name}: {node.op_type} has no function")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the functions.

        Raises:
            ValueError: a node that is not of the operators' table.
        """
        used = {node.op_type for node in model.graph if node.domain == DOMAIN}
        modified = not used <= {found.name for found in model.functions.values()}
        if modified:
            attach_functions(model)
        return ir.passes.PassResult(model, modified=modified)
