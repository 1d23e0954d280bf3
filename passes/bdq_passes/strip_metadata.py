"""Remove what builders left in the graph about the machine and the code that made it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from bdq_passes.annotations import PREFIX
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, verify


@dataclass(frozen=True)
class StripMetadataPass(GraphPass):
    """Keep only this project's annotations on nodes, values, tensors, functions and the graph; set the model's own.

    Stack traces, file paths, namespaces, class hierarchies and documentation strings go. The model's metadata becomes
    exactly `properties`.

    Requires and ensures `level`, LOWERED unless told otherwise. A second run changes nothing.

    Attributes:
        properties: the metadata of the model.
        level: level of the graph, before and after.
    """

    name: ClassVar[str] = "strip-metadata"
    takes: ClassVar[Level] = Level.LOWERED
    gives: ClassVar[Level] = Level.LOWERED

    properties: Mapping[str, str] = field(default_factory=dict)
    level: Level = Level.LOWERED

    def requires(self, model: ir.Model) -> None:
        """Raise when the model is not at `level`."""
        verify(model, self.level)

    def ensures(self, model: ir.Model) -> None:
        """Raise when the model is not at `level`."""
        verify(model, self.level)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Strip the graph and set the model's metadata."""
        modified = False
        if model.doc_string is not None:
            model.doc_string, modified = None, True
        for item in _described(model):
            foreign = [key for key in item.metadata_props if not key.startswith(PREFIX)]
            for key in foreign:
                del item.metadata_props[key]
            modified |= bool(foreign) or item.doc_string is not None
            item.doc_string = None
        if model.metadata_props != self.properties:
            model.metadata_props.clear()
            model.metadata_props.update(self.properties)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


_Described = ir.Graph | ir.Function | ir.Node | ir.Value


def _described(model: ir.Model) -> Iterator[_Described]:
    """Everything in the model that carries metadata and a documentation string, but the model itself."""
    yield model.graph
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    yield from model.functions.values()
    nodes = [*model.graph.all_nodes(), *(node for item in model.functions.values() for node in item.all_nodes())]
    for node in nodes:
        yield node
        yield from node.outputs
