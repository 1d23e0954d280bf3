"""Nodes of the `bdq` operators, made by the operators' own table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION, Attribute

LINEAR_OPS = frozenset(name for name, operator in OPERATORS.items() if "weight" in operator.inputs)
ATTENTION_OPS = frozenset(name for name, operator in OPERATORS.items() if "past_key" in operator.inputs)


def bdq_node(
    model: ir.Model, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Attribute], name: str
) -> ir.Node:
    """A node of the operator `op_type`, whose outputs are called after it; the model imports the domain.

    Raises:
        ValueError: inputs or attributes that are not those of the table.
    """
    operator = OPERATORS[op_type]
    if len(inputs) != len(operator.inputs):
        raise ValueError(f"node {name}: {op_type} with {len(inputs)} inputs, expected {', '.join(operator.inputs)}")
    unknown = set(attributes) - set(operator.attributes)
    missing = set(operator.required_attributes) - set(attributes)
    if unknown or missing:
        raise ValueError(f"node {name}: {op_type} with unknown {sorted(unknown)}, without {sorted(missing)}")
    node = ir.node(op_type, inputs, attributes, domain=DOMAIN, name=name, num_outputs=len(operator.outputs))
    first, *others = node.outputs
    first.name = f"{name}/output"
    for value, output in zip(others, list(operator.outputs)[1:], strict=True):
        value.name = f"{name}/{output}"
    model.opset_imports[DOMAIN] = VERSION
    return node


def is_bdq(node: ir.Node | None, op_type: str) -> bool:
    """Whether `node` is of the operator `op_type` of this project."""
    return node is not None and node.domain == DOMAIN and node.op_type == op_type
