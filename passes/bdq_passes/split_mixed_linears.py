"""Take apart packed linears whose parts are to differ in precision."""

from __future__ import annotations

import itertools
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
    """Split each linear whose parts do not all have the same spec; neighbours of one spec stay together.

        MatMul(x, W [K, N1 + N2])  {bdq.parts: a,b}
        ->
        Concat(MatMul(x, W1) {bdq.parts: a}, MatMul(x, W2) {bdq.parts: b}, axis=-1)

    The new nodes and weights are named by their logical paths (`layers.0.k_proj+v_proj` for neighbours). Weights are
    views of the packed one. The number of linears that the graph carries is corrected.

    Requires ANNOTATED, ensures ANNOTATED. A second run changes nothing.

    Attributes:
        specs: by canonical name, `<logical path>.weight`; float where absent.
        columns: output columns of parts, by canonical name; those of one group of neighbours may be left out, since
            they are what remains.
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

    def _groups(self, node: ir.Node, total: int) -> list[tuple[tuple[str, ...], int]]:
        """Neighbouring parts of one spec, with the columns that they have together."""
        by_spec = itertools.groupby(note.parts(node), key=lambda part: self.specs.get(f"{part}.weight"))
        groups = [tuple(parts) for _, parts in by_spec]
        known = [[self.columns.get(f"{part}.weight") for part in parts] for parts in groups]
        widths = [None if None in found else sum(filter(None, found)) for found in known]
        if widths.count(None) == 1:
            widths[widths.index(None)] = total - sum(filter(None, widths))
        exact = [width for width in widths if width is not None and width > 0]
        if len(exact) != len(groups) or sum(exact) != total:
            raise ValueError(f"node {node.name}: parts {groups} have {widths} columns, expected {total} in all")
        return list(zip(groups, exact, strict=True))

    def _split(self, model: ir.Model, node: ir.Node) -> None:
        value = weight_value(node)
        packed = array_of(value)
        pieces = []
        start = 0
        for parts, width in self._groups(node, packed.shape[1]):
            name = "+".join([parts[0], *(part.rpartition(".")[2] for part in parts[1:])])
            weight = initializer(model, f"{name}.weight", packed[:, start : start + width])
            piece = ir.node("MatMul", [required_input(node, 0), weight], name=name)
            piece.outputs[0].name, piece.outputs[0].type = f"{name}/output", node.outputs[0].type
            note.set_parts(piece, parts)
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
