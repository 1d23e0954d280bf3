"""Small edits of an onnx_ir graph that several steps of a builder make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

_NAMED, _SCOPE = "bdq.named", "bdq.scope"
"""Keys of `ir.Node.meta`, which is never serialized."""


def constant(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer `name` holding `array` (a view is kept, not copied); an existing one is returned as it is."""
    existing = model.graph.initializers.get(name)
    return existing if existing is not None else initializer(model, ir.Tensor(array, name=name))


def initializer(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer of the tensor's name."""
    shape = ir.Shape(tensor.shape.numpy())
    value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def set_name(node: ir.Node, name: str) -> None:
    """Name `node` for good: the final naming keeps it."""
    node.name = name
    node.meta[_NAMED] = True


def has_final_name(node: ir.Node) -> bool:
    """Whether `set_name` named the node."""
    return bool(node.meta.get(_NAMED))


def set_scope(node: ir.Node, path: str) -> None:
    """Remember the path of the module that `node` is part of."""
    node.meta[_SCOPE] = path


def scope_of(node: ir.Node) -> str:
    """The module path of `set_scope`; "" where none is known."""
    return str(node.meta.get(_SCOPE, ""))


def insert_first(model: ir.Model, nodes: Sequence[ir.Node]) -> None:
    """Put `nodes` before all others; their names are final."""
    for node in nodes:
        set_name(node, str(node.name))
    model.graph.insert_before(model.graph[0], nodes)


def is_op(node: ir.Node | None, op_type: str) -> bool:
    """Whether `node` exists and is the standard or contrib operator `op_type`."""
    return node is not None and node.op_type == op_type


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes `value` if it is an `op_type`."""
    node = None if value is None else value.producer()
    return node if is_op(node, op_type) else None


def operand(node: ir.Node, index: int) -> ir.Value:
    """Input `index` of `node`, which must be there.

    Raises:
        ValueError: the node has no such input.
    """
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        raise ValueError(f"node {node.name}: {node.op_type} has no input {index}")
    return value


def static_ints(value: ir.Value | None) -> tuple[int, ...] | None:
    """The contents of a small integer constant, also behind Cast and Reshape; None where unknown."""
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type in ("Cast", "Reshape"):
        return static_ints(producer.inputs[0])
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tuple(int(item) for item in tensor.numpy().reshape(-1))


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, graph outputs included, read `new`."""
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def remove_dead(model: ir.Model) -> None:
    """Remove nodes that feed no output, and initializers that nobody reads."""
    for node in reversed(list(model.graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
