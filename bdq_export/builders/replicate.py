"""Repeat traced decoder layers: a graph with one layer of each type becomes the graph of the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from bdq_export.builders.graph import scope_of, set_scope
from bdq_export.errors import UnsupportedModelError


@dataclass(frozen=True)
class _Layer:
    """A traced layer: its nodes, the hidden state it reads, and the one it makes."""

    index: int
    nodes: tuple[ir.Node, ...]
    source: ir.Value
    result: ir.Value


def repeat_layers(model: ir.Model, layers: str, order: Sequence[int]) -> None:
    """Replace the traced layers by copies, in place.

    Names of parameters, cache inputs and outputs follow the new index; constants are shared.

    Args:
        model: layer i is the nodes with a scope under `<layers>.<i>`; layers follow one another.
        layers: path prefix of the decoder layers.
        order: for each layer of the result, the traced layer to copy.

    Raises:
        UnsupportedModelError: a layer reads or makes anything but one hidden state and its cache.
    """
    traced = [_find(model, f"{layers}.{index}", index) for index in range(max(order) + 1)]
    hidden, anchor = traced[0].source, traced[-1].nodes[-1]
    leaves: dict[str, ir.Value] = {}
    outputs: dict[str, ir.Value] = {}
    for index, template in enumerate(order):
        copy = _Copy(traced[template], layers, index, leaves)
        nodes = copy.make(hidden)
        model.graph.insert_after(anchor, nodes)
        anchor, hidden = nodes[-1], copy.values[traced[template].result]
        outputs |= copy.outputs()
    traced[-1].result.replace_all_uses_with(hidden)
    _swap_in(model, traced, leaves, outputs)


def _swap_in(
    model: ir.Model, traced: Sequence[_Layer], leaves: dict[str, ir.Value], outputs: dict[str, ir.Value]
) -> None:
    """Remove the traced layers with their parameters and cache, and declare those of the copies."""
    graph = model.graph
    kept = [value for value in graph.outputs if not str(value.name).startswith("present.")]
    graph.outputs[:] = [*kept, *outputs.values()]
    graph.remove([node for layer in traced for node in layer.nodes], safe=True)
    graph.inputs[:] = [value for value in graph.inputs if not str(value.name).startswith("past_key_values.")]
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    for name, value in outputs.items():
        value.name = name
    for name, value in leaves.items():
        if name.startswith("past_key_values."):
            graph.inputs.append(value)
        else:
            graph.initializers.add(value)


def _find(model: ir.Model, prefix: str, index: int) -> _Layer:
    nodes = tuple(node for node in model.graph if f"{scope_of(node)}.".startswith(f"{prefix}."))
    inside = {value for node in nodes for value in node.outputs}
    read = {value for node in nodes for value in node.inputs if value is not None and value.producer() is not None}
    sources = read - inside
    members = set(nodes)
    results = {value for value in inside if any(user not in members for user, _ in value.uses())}
    if len(sources) != 1 or len(results) != 1:
        raise UnsupportedModelError(
            f"{prefix} reads {len(sources)} and makes {len(results)} values, expected one hidden state each: "
            "the layers of this model cannot be repeated"
        )
    return _Layer(index, nodes, sources.pop(), results.pop())


class _Copy:
    """One copy of a traced layer under a new index."""

    def __init__(self, layer: _Layer, layers: str, index: int, leaves: dict[str, ir.Value]) -> None:
        self.layer, self.leaves = layer, leaves
        self.values: dict[ir.Value, ir.Value] = {}
        self._names = (
            (f"{layers}.{layer.index}.", f"{layers}.{index}."),
            (f"past_key_values.{layer.index}.", f"past_key_values.{index}."),
            (f"present.{layer.index}.", f"present.{index}."),
        )

    def rename(self, name: str) -> str | None:
        """The name under the new index; None for what is not of this layer."""
        for old, new in self._names:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return None

    def make(self, hidden: ir.Value) -> list[ir.Node]:
        """The copied nodes, reading `hidden`."""
        self.values[self.layer.source] = hidden
        nodes = []
        for node in self.layer.nodes:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [None if value is None else self._input(value) for value in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
            )
            set_scope(copy, str(self.rename(f"{scope_of(node)}.")).rstrip("."))
            self.values.update(zip(node.outputs, copy.outputs, strict=True))
            nodes.append(copy)
        return nodes

    def outputs(self) -> dict[str, ir.Value]:
        """The cache outputs of the copy, by name."""
        found = {self.rename(str(value.name)): copy for value, copy in self.values.items() if value.is_graph_output()}
        return {name: value for name, value in found.items() if name is not None}

    def _input(self, value: ir.Value) -> ir.Value:
        """What the copy reads instead of `value`: its own value, parameter or cache, or the same shared one."""
        if value in self.values:
            return self.values[value]
        name = None if value.producer() is not None else self.rename(str(value.name))
        if name is None:
            return value
        leaf = ir.Value(name=name, shape=value.shape, type=value.type, const_value=value.const_value)
        self.values[value] = self.leaves[name] = leaf
        return leaf
