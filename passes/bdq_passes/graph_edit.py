"""Small edits that several passes make: add an initializer, put a node somewhere, swap one node for another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from bdq_passes.storage import stored


def initializer(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer `name`, made from `array` (a view is kept, not copied; see `storage`) unless it is there."""
    existing = model.graph.initializers.get(name)
    if existing is not None:
        return existing
    tensor = ir.Tensor(stored(array), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def array_of(value: ir.Value) -> npt.NDArray[Any]:
    """The contents of an initializer.

    Raises:
        ValueError: the value is no constant.
    """
    if value.const_value is None:
        raise ValueError(f"value {value.name} is no constant")
    return value.const_value.numpy()


def required_input(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of a node.

    Raises:
        ValueError: the input is missing.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise ValueError(f"node {node.name}: {node.op_type} without input {index}")
    return value


def bias_add(linear: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """The Add of an `[N]` initializer that alone reads the output of a MatMul `[K, N]`, with that bias; or None."""
    output, weight = linear.outputs[0], required_input(linear, 1)
    readers = output.consumers()
    if len(readers) != 1 or readers[0].op_type != "Add" or output.is_graph_output() or weight.shape is None:
        return None
    for value in readers[0].inputs:
        if value is None or not value.is_initializer() or value.shape is None:
            continue
        if tuple(value.shape) == (weight.shape[1],):
            return readers[0], value
    return None


def replace_node(old: ir.Node, new: ir.Node) -> None:
    """Put `new` in the place of `old`: its position, its metadata and the name, type and shape of its output."""
    graph = old.graph
    assert graph is not None, "the node belongs to no graph"
    new.metadata_props.update(old.metadata_props)
    source, target = old.outputs[0], new.outputs[0]
    target.type, target.shape, target.name = source.type, source.shape, source.name
    graph.insert_before(old, new)
    source.replace_all_uses_with(target, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def absorb(node: ir.Node, add: ir.Node) -> None:
    """Let `node` make what `add`, which alone reads it, makes."""
    source, target = add.outputs[0], node.outputs[0]
    name = source.name
    source.replace_all_uses_with(target, replace_graph_outputs=True)
    assert add.graph is not None, "the node belongs to the graph that it was found in"
    add.graph.remove(add, safe=True)
    target.name = name


def remove_unused(model: ir.Model, values: Iterable[ir.Value]) -> None:
    """Drop each initializer, or the node that makes it, that nobody reads any more, and then what that node read."""
    for value in values:
        if value.uses() or value.is_graph_output():
            continue
        producer = value.producer()
        if producer is None:
            if value.name is not None and not value.is_graph_input():
                model.graph.initializers.pop(value.name, None)
            continue
        inputs = [item for item in dict.fromkeys(producer.inputs) if item is not None]
        model.graph.remove(producer, safe=True)
        remove_unused(model, inputs)
