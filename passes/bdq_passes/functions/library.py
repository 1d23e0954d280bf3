"""Which functions a model needs: one for each name of a `bdq` operator in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import onnx_ir as ir

from bdq_passes.functions.activations import fake_quantize
from bdq_passes.functions.attention import attention
from bdq_passes.functions.body import Body, Value, function
from bdq_passes.functions.hadamard import hadamard
from bdq_passes.functions.linear import linear
from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION, Operator

MIN_OPSET = 18
"""The first version of the default domain that has every operator of the bodies."""

_KEEP_RANK = {
    *("Add", "Cast", "Div", "Identity", "Mul", "Slice", "Sub"),
    *("RMSNormalization", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    "GroupQueryAttention",
}
"""Operators whose first output has as many axes as their first input that is no constant."""

_Build = Callable[[Body, dict[str, ir.Value]], Sequence[ir.Value]]


def attach_functions(model: ir.Model) -> None:
    """Give every `bdq` node of a model its function, and every attribute that it left out its default.

    Functions have no defaults of their own, since not every evaluator reads those.

    Raises:
        ValueError: a node that is not of the table, or an opset too old for the bodies.
    """
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    for node in nodes:
        for name, value in attributes_of(node).items():
            if name not in node.attributes:
                node.attributes.add(ir.convenience.convert_attribute(name, value))
    for found in functions_for(nodes, model.opset_imports[""]):
        model.functions[found.identifier()] = found
    if nodes:
        model.opset_imports[DOMAIN] = VERSION


def functions_for(nodes: Iterable[ir.Node], opset: int) -> list[ir.Function]:
    """One function for each operator among `bdq` nodes, right for the attributes that these nodes have.

    Args:
        nodes: all `bdq` nodes of a model.
        opset: the version of the default domain that the model imports.

    Raises:
        ValueError: a node that is not of the table, or an opset too old for the bodies.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"the model imports version {opset} of the default domain, function bodies need {MIN_OPSET}")
    found: dict[str, list[ir.Node]] = {}
    for node in nodes:
        found.setdefault(node.op_type, []).append(node)
    return [_function(found_nodes, opset) for found_nodes in found.values()]


def attributes_of(node: ir.Node) -> dict[str, Value]:
    """Attributes of a `bdq` node, with the table's values for those that it leaves out.

    Raises:
        ValueError: no operator of the table, or attributes that it lacks or does not have.
    """
    operator = OPERATORS.get(node.op_type)
    if operator is None:
        raise ValueError(f"node {node.name}: no operator {DOMAIN}::{node.op_type}")
    given = {name: attribute.value for name, attribute in node.attributes.items()}
    unknown, missing = set(given) - set(operator.attributes), set(operator.required_attributes) - set(given)
    if unknown or missing:
        raise ValueError(f"node {node.name}: unknown attributes {sorted(unknown)}, missing ones {sorted(missing)}")
    defaults = {name: value for name, value in operator.attributes.items() if not isinstance(value, type)}
    return {**defaults, **given}


def _function(nodes: Sequence[ir.Node], opset: int) -> ir.Function:
    """The function of nodes of one name."""
    given = [attributes_of(node) for node in nodes]
    operator = OPERATORS[nodes[0].op_type]
    build = _build(operator, _axes(nodes))
    return function(DOMAIN, operator.name, operator.inputs, operator.attributes, opset, given, build)


def _axes(nodes: Sequence[ir.Node]) -> int | None:
    """How many axes the first inputs of all nodes have in front of their channels, where that is known and the same."""
    (rank, *others) = {_rank(node.inputs[0]) for node in nodes}
    return None if rank is None or others else rank - 1


def _rank(value: ir.Value | None) -> int | None:
    """The rank of a value, from what made it where the graph does not say; None where that does not say either."""
    while value is not None:
        if value.shape is not None:
            return value.shape.rank()
        node = value.producer()
        if node is not None and node.op_type == "Reshape" and node.inputs[1] is not None:
            sizes = node.inputs[1].shape
            return None if sizes is None or not isinstance(sizes[0], int) else sizes[0]
        if node is None or not (node.domain == DOMAIN or node.op_type in _KEEP_RANK):
            return None
        value = next((item for item in node.inputs if item is not None and not item.is_initializer()), None)
    return None


def _build(operator: Operator, axes: int | None) -> _Build:
    if "weight" in operator.inputs:
        return lambda body, inputs: [linear(body, inputs, axes)]
    if "past_key" in operator.inputs:
        return attention
    if operator.name == "Hadamard":
        return lambda body, inputs: [hadamard(body, inputs["x"], "size", None, axes, interleave="interleave")]
    return lambda body, inputs: [fake_quantize(body, inputs["x"])]
