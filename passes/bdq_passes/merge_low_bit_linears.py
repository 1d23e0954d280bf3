"""Compute linears that read the same input by one `bdq` operator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.graph_edit import array_of, initializer, remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level
from bdq_runtime.opset import DOMAIN, OPERATORS

_PANEL = 16
_PACKED = ("weight", "scales", "bias")


@dataclass(frozen=True)
class MergeLowBitLinearsPass(GraphPass):
    """Merge `bdq::[Hadamard]LowBitLinear[Bias]` of one input, so that it is transformed and quantized once.

        q = LowBitLinear(x, Wq, sq);  k = LowBitLinear(x, Wk, sk);  v = LowBitLinear(x, Wv, sv)
        ->
        q, k, v = Split(LowBitLinear(x, [Wq Wk Wv], [sq sk sv]))

    which is what families without norms on queries and keys have from the start. They must follow each other; operator,
    attributes but `N`, and what stands in front must be equal; and all weights but the last have whole panels of 16
    channels. Others are left as they are. Numbers do not change. The number of linears in the metadata is corrected.

    Requires QUANTIZED, ensures QUANTIZED. A second run changes nothing.
    """

    name: ClassVar[str] = "merge-low-bit-linears"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the groups."""
        groups = list(_groups(model))
        for group in groups:
            _merge(model, group)
        if groups:
            note.set_linear_count(model, len(list(note.with_role(model, note.LINEAR))))
        return ir.passes.PassResult(model, modified=bool(groups))


def _groups(model: ir.Model) -> Iterator[list[ir.Node]]:
    """Two linears and more that can be one, in the order of the graph."""
    linears = [node for node in note.with_role(model, note.LINEAR) if _is_plain(node)]
    groups: list[list[ir.Node]] = []
    for node in linears:
        if groups and _fit(groups[-1][-1], node):
            groups[-1].append(node)
        else:
            groups.append([node])
    return (group for group in groups if len(group) > 1)


def _is_plain(node: ir.Node) -> bool:
    operator = OPERATORS.get(node.op_type) if node.domain == DOMAIN else None
    return operator is not None and "weight" in operator.inputs and "gate" not in operator.attributes


def _fit(before: ir.Node, node: ir.Node) -> bool:
    if before.inputs[0] is not node.inputs[0] or before.op_type != node.op_type or note.tied(node):
        return False
    if before.attributes["N"].as_int() % _PANEL:
        return False
    names = set(OPERATORS[node.op_type].attributes) - {"N"}
    return all(before.attributes[name].value == node.attributes[name].value for name in names) and all(
        _equal(_input(before, name), _input(node, name))
        for name in OPERATORS[node.op_type].inputs
        if name not in ("x", *_PACKED)
    )


def _equal(a: ir.Value, b: ir.Value) -> bool:
    return a is b or np.array_equal(array_of(a), array_of(b))


def _input(node: ir.Node, name: str) -> ir.Value:
    return required_input(node, list(OPERATORS[node.op_type].inputs).index(name))


def _merge(model: ir.Model, group: list[ir.Node]) -> None:
    first = group[0]
    parts = tuple(part for node in group for part in note.parts(node))
    parent = str(first.name).rpartition(".")[0]
    path = f"{parent}.{'_'.join(str(node.name).removeprefix(f'{parent}.') for node in group)}".lstrip(".")
    inputs = []
    for name in OPERATORS[first.op_type].inputs:
        values = [_input(node, name) for node in group]
        if name in _PACKED:
            inputs.append(initializer(model, f"{path}.{name}", np.concatenate([array_of(value) for value in values])))
        else:
            inputs.append(values[0])
    sizes = [node.attributes["N"].as_int() for node in group]
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    merged = bdq_node(model, first.op_type, inputs, {**attributes, "N": sum(sizes)}, path)
    merged.metadata_props.update(first.metadata_props)
    note.set_parts(merged, parts)
    merged.outputs[0].type = first.outputs[0].type
    lengths = initializer(model, f"{path}/sizes", np.array(sizes, np.int64))
    split = ir.node("Split", [merged.outputs[0], lengths], {"axis": -1}, num_outputs=len(group), name=f"{path}/split")
    model.graph.insert_before(first, [merged, split])
    for node, target in zip(group, split.outputs, strict=True):
        source = node.outputs[0]
        called, target.type, target.shape = source.name, source.type, source.shape
        source.replace_all_uses_with(target, replace_graph_outputs=True)
        old = [value for value in node.inputs if value is not None]
        model.graph.remove(node, safe=True)
        target.name = called
        remove_unused(model, old)
