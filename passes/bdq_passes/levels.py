"""The levels a graph goes through, and what is true of a graph at each.

    FLOAT      stock operators only, none of them quantized
    ANNOTATED  FLOAT, and every linear carries its role; the graph knows their number
    QUANTIZED  every annotated weight is quantized, lowered or kept float; runs on stock ONNX Runtime, where `bdq` nodes
               run as their functions once they are attached
    LOWERED    QUANTIZED, and no annotated weight is dequantized in the graph: kernels read the codes

FLOAT holds at ANNOTATED too, and QUANTIZED at LOWERED, so a pass that needs the weaker level runs at both.
"""

from __future__ import annotations

from enum import Enum

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import LINEAR_OPS
from bdq_runtime.opset import DOMAIN, OPERATORS

CONTRIB = "com.microsoft"
LOWERED_OPS = frozenset({"MatMulNBits", "GatherBlockQuantized", "QLinearMatMul"}) | LINEAR_OPS
QUANTIZED_OPS = LOWERED_OPS | {"QuantizeLinear", "DequantizeLinear", "MatMulInteger", "DynamicQuantizeLinear"}
_DOMAINS = frozenset({"", "ai.onnx", CONTRIB, DOMAIN})
_WEIGHT_INPUT = {note.LINEAR: ("MatMul", 1), note.EMBEDDING: ("Gather", 0)}


class Level(Enum):
    """How far a graph has come."""

    FLOAT = "float"
    ANNOTATED = "annotated"
    QUANTIZED = "quantized"
    LOWERED = "lowered"


class LevelError(ValueError):
    """A graph that is not at the level it should be; the message names the node and what was expected."""


def verify(model: ir.Model, level: Level) -> None:
    """Raise `LevelError` unless `model` is at `level`."""
    _verify_domains(model)
    if level in (Level.FLOAT, Level.ANNOTATED):
        _verify_float(model)
    if level is not Level.FLOAT:
        _verify_count(model)
    for node in model.graph:
        if note.role(node) not in (note.LINEAR, note.EMBEDDING):
            continue
        if level is Level.ANNOTATED:
            _verify_float_weight(node)
        elif level in (Level.QUANTIZED, Level.LOWERED):
            _verify_decided(node, level)


def _verify_domains(model: ir.Model) -> None:
    for node in model.graph:
        if node.domain not in _DOMAINS:
            raise LevelError(f"node {node.name}: domain {node.domain!r}, expected one of {sorted(_DOMAINS)}")
        if node.domain == DOMAIN and node.op_type not in OPERATORS:
            raise LevelError(f"node {node.name}: no operator {node.op_type} in the domain {DOMAIN}")


def _verify_float(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in QUANTIZED_OPS or node.domain == DOMAIN:
            raise LevelError(f"node {node.name}: {node.op_type} in a graph that should be float")


def _verify_count(model: ir.Model) -> None:
    expected = note.linear_count(model)
    found = sum(1 for _ in note.with_role(model, note.LINEAR))
    if expected is None:
        raise LevelError("no linears are annotated: run annotate-linears first")
    if found != expected:
        raise LevelError(f"{found} linears are annotated, expected {expected}: a pass lost or doubled some")


def weight_value(node: ir.Node) -> ir.Value:
    """The weight of an annotated MatMul or Gather: an initializer while float, else what dequantizes it.

    Raises:
        LevelError: the node is not the operator of its role, or the input is missing.
    """
    op_type, index = _WEIGHT_INPUT[str(note.role(node))]
    if node.op_type != op_type:
        raise LevelError(f"node {node.name}: {node.op_type} with role {note.role(node)}, expected {op_type}")
    value = node.inputs[index]
    if value is None:
        raise LevelError(f"node {node.name}: the weight input is missing")
    return value


def dequantizer(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that makes the weight of an annotated node from an initializer, or None."""
    if node.op_type in LOWERED_OPS:
        return None
    producer = weight_value(node).producer()
    if producer is None or producer.op_type != "DequantizeLinear":
        return None
    codes = producer.inputs[0]
    return producer if codes is not None and codes.is_initializer() else None


def _verify_float_weight(node: ir.Node) -> None:
    value = weight_value(node)
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose" and note.tied(node) == _name(producer.inputs[0]):
        return  # the table that the embedding reads
    if not value.is_initializer() or value.const_value is None or len(value.const_value.shape) != 2:
        raise LevelError(f"node {node.name}: weight {value.name} is no two-dimensional initializer")


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _verify_decided(node: ir.Node, level: Level) -> None:
    if note.is_kept(node):
        _verify_float_weight(node)
    elif note.spec(node) is None:
        raise LevelError(f"node {node.name}: neither quantized nor kept float")
    elif node.op_type in LOWERED_OPS or _reads_codes(node):
        return
    elif level is Level.LOWERED:
        raise LevelError(f"node {node.name}: {node.op_type} on a dequantized weight, expected a lowered operator")
    elif dequantizer(node) is None:
        raise LevelError(f"node {node.name}: weight {weight_value(node).name} is no dequantized initializer")


def _reads_codes(node: ir.Node) -> bool:
    """Whether a lookup reads packed codes, which nodes behind it unpack."""
    value = weight_value(node)
    return note.role(node) == note.EMBEDDING and value.is_initializer() and value.dtype == ir.DataType.UINT8
