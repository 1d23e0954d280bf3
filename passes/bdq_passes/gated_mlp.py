"""Find the gated MLPs of a graph: `act(gate) * up`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import bias_add, required_input

SILU = "silu"
GELU_TANH = "gelu_tanh"


@dataclass(frozen=True, eq=False)
class GatedMlp:
    """One product of an activated gate and an up projection.

    Attributes:
        gate: what is activated: the output of a linear, of its bias Add, or the first half of a Split of either.
        up: the other factor, of the same kind.
        activation: `silu` or `gelu_tanh`.
        nodes: those that compute the product from the two, in order; the last gives the product.
    """

    gate: ir.Value
    up: ir.Value
    activation: str
    nodes: tuple[ir.Node, ...]


def gated_mlps(model: ir.Model) -> Iterator[GatedMlp]:
    """Every `Mul(act(gate), up)` of the main graph, whose gate and up come from linears, in graph order.

        silu       Mul(gate, Sigmoid(gate))
        gelu_tanh  Gelu(gate) {approximate: tanh}

    The operands of a Mul may come in either order.
    """
    for node in list(model.graph):
        if node.op_type != "Mul" or len(node.inputs) != 2:
            continue
        for activated, up in (tuple(node.inputs), tuple(reversed(node.inputs))):
            found = _activation(activated)
            if found is not None and up is not None and _is_projection(found[0]) and _is_projection(up):
                gate, activation, nodes = found
                yield GatedMlp(gate, up, activation, (*nodes, node))
                break


def linear_of(value: ir.Value) -> tuple[ir.Node, ir.Node | None] | None:
    """The annotated linear that makes `value`, and the Add of its bias if there is one; None for another value."""
    producer = value.producer()
    if producer is None:
        return None
    if producer.op_type == "Add":
        for operand in producer.inputs:
            linear = None if operand is None else operand.producer()
            if linear is not None and note.role(linear) == note.LINEAR:
                added = bias_add(linear)
                return (linear, producer) if added is not None and added[0] is producer else None
        return None
    return (producer, None) if note.role(producer) == note.LINEAR else None


def bias_of(add: ir.Node) -> ir.Value:
    """The initializer that an Add of a bias adds."""
    return next(value for value in add.inputs if value is not None and value.is_initializer())


def halves_of(value: ir.Value) -> tuple[ir.Node, int] | None:
    """The Split in two along the last axis that makes `value`, and which half it is; None for another value."""
    producer = value.producer()
    if producer is None or producer.op_type != "Split" or len(producer.outputs) != 2 or len(producer.inputs) != 1:
        return None
    axis = producer.attributes.get("axis")
    if axis is None or axis.as_int() != -1:
        return None
    return producer, producer.outputs.index(value)


def _is_projection(value: ir.Value) -> bool:
    half = halves_of(value)
    return linear_of(value if half is None else required_input(half[0], 0)) is not None


def _activation(value: ir.Value | None) -> tuple[ir.Value, str, tuple[ir.Node, ...]] | None:
    """What `value` is the activation of, which one, and the nodes that compute it."""
    node = None if value is None else value.producer()
    if node is None:
        return None
    if node.op_type == "Gelu":
        approximate = node.attributes.get("approximate")
        if approximate is None or approximate.as_string() != "tanh":
            return None
        return required_input(node, 0), GELU_TANH, (node,)
    if node.op_type == "Mul":
        for gate, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
            sigmoid = None if other is None else other.producer()
            if gate is not None and sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is gate:
                return gate, SILU, (sigmoid, node)
    return None
