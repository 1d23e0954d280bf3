"""Take apart packed linears whose parts are to differ in precision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import array_of, initializer, remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, weight_value
from bdq_runtime.packing import QuantSpec


@dataclass(frozen=True)
class SplitMixedLinearsPass(GraphPass):
    """Split each linear whose parts do not all have the same spec into one linear a part.

        MatMul(x, W [K, N1 + N2])  {bdq.parts: a,b}
        ->
        Concat(MatMul(x, W1) {bdq.parts: a}, MatMul(x, W2) {bdq.parts: b}, axis=-1)

    The new nodes and weights are named by their logical path. Weights are views of the packed one. The number of
    linears that the graph carries is corrected.

    Requires ANNOTATED, ensures ANNOTATED. A second run changes nothing.

    Attributes:
        specs: by canonical name, `<logical path>.weight`; float where absent.
        columns: output columns of each part of a linear that is split, by canonical name.
    """

    name: ClassVar[str] = "split-mixed-linears"
    takes: ClassVar[Level] = Level.ANNOTATED
    gives: ClassVar[Level] = Level.ANNOTATED

    specs: Mapping[str, QuantSpec]
    columns: Mapping[str, int]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Split what is mixed.

        Raises:
            ValueError: columns that are missing or do not add up to those of the packed weight.
        """
        mixed = [
            node
            for node in note.with_role(model, note.LINEAR)
            if len({self.specs.get(f"{part}.weight") for part in note.parts(node)}) > 1
        ]
        for node in mixed:
            self._split(model, node)
        if mixed:
            note.set_linear_count(model, len(list(note.with_role(model, note.LINEAR))))
        return ir.passes.PassResult(model, modified=bool(mixed))

    def _split(self, model: ir.Model, node: ir.Node) -> None:
        value = weight_value(node)
        packed = array_of(value)
        parts = note.parts(node)
        widths = [self.columns.get(f"{part}.weight", 0) for part in parts]
        if 0 in widths or sum(widths) != packed.shape[1]:
            raise ValueError(
                f"node {node.name}: parts {parts} have {widths} columns, expected {packed.shape[1]} in all"
            )
        pieces = []
        start = 0
        for part, width in zip(parts, widths, strict=True):
            weight = initializer(model, f"{part}.weight", packed[:, start : start + width])
            piece = ir.node("MatMul", [required_input(node, 0), weight], name=part)
            piece.outputs[0].name, piece.outputs[0].type = f"{part}/output", node.outputs[0].type
            note.set_parts(piece, (part,))
            note.set_role(piece, note.LINEAR)
            pieces.append(piece)
            start += width
        joined = ir.node("Concat", [piece.outputs[0] for piece in pieces], {"axis": -1}, name=f"{node.name}/join")
        source, target = node.outputs[0], joined.outputs[0]
        target.name, target.type, target.shape = source.name, source.type, source.shape
        model.graph.insert_before(node, [*pieces, joined])
        source.replace_all_uses_with(target, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        remove_unused(model, [value])
