"""In which precision linears and attention of an ONNX graph really run, told from their nodes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bdq_export.commands.graph_roles import is_online, tensor_bytes
from bdq_runtime.opset import DOMAIN, OPERATORS

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_FLOAT_MATMULS = ("MatMul", "Gemm", "FusedMatMul")
_FLOAT_ACTIVATIONS = 16


@dataclass(frozen=True)
class Precision:
    """How one group of linears runs.

    Attributes:
        op: operator.
        count: nodes.
        weight_bits: of the stored weights; 16 and 32 are float.
        block_size: columns that share a scale; 0 is one scale for each row or tensor.
        symmetric: whether no zero points are stored.
        executed: weights and activations as the kernel computes them, such as "w4a8".
        note: the same in words.
    """

    op: str
    count: int
    weight_bits: int
    block_size: int
    symmetric: bool
    executed: str
    note: str


@dataclass(frozen=True)
class CachePrecision:
    """How one group of attention nodes keeps keys and values.

    Attributes:
        op: operator.
        count: nodes.
        key_bits: of the cached keys; 32 is float32.
        value_bits: of the cached values.
        hadamard: whether query and key heads are rotated first.
    """

    op: str
    count: int
    key_bits: int
    value_bits: int
    hadamard: bool


def linear_precisions(graph: GraphProto) -> tuple[Precision, ...]:
    """Groups of linears, the most frequent first."""
    found = Counter(precision for _, precision in node_precisions(graph))
    return tuple(Precision(op, count, *rest) for (op, *rest), count in found.most_common())


def cache_precisions(graph: GraphProto) -> tuple[CachePrecision, ...]:
    """Groups of attention nodes, the most frequent first."""
    found = Counter(_caches(graph))
    return tuple(CachePrecision(op, count, *rest) for (op, *rest), count in found.most_common())


def _caches(graph: GraphProto) -> Iterator[tuple[Any, ...]]:
    """Of each attention node: op, bits of keys and of values, whether heads are rotated."""
    for node in graph.node:
        values = _values(node)
        if node.domain == DOMAIN and "past_key" in OPERATORS[node.op_type].inputs:
            rotated = bool(values.get("hadamard", 0))
            yield f"{DOMAIN}::{node.op_type}", values["key_bits"], values["value_bits"], rotated
        elif node.op_type == "GroupQueryAttention":
            bits = values.get("kv_cache_bit_width", 0) or 32
            yield node.op_type, bits, bits, False


def node_precisions(graph: GraphProto) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Of each linear: name of the node; op, weight bits, block size, symmetric, executed, note."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.domain == DOMAIN and "weight" in OPERATORS[node.op_type].inputs:
            yield node.name, _low_bit(node)
        elif node.op_type == "MatMulNBits":
            yield node.name, _matmul_nbits(node)
        elif node.op_type == "QLinearMatMul":
            integers = "8-bit integers, activation scales fixed at export"
            yield node.name, ("QLinearMatMul", 8, 0, True, "w8a8", integers)
        elif node.op_type in _FLOAT_MATMULS and len(node.input) > 1 and not is_online(node):
            source = producers.get(node.input[1])
            if node.input[1] in weights:
                yield node.name, _float(node, _element_bits(weights[node.input[1]]), producers.get(node.input[0]))
            elif source is not None and source.op_type == "DequantizeLinear" and source.input[0] in weights:
                yield node.name, _dequantized(node, source, weights, producers)


def _float(node: NodeProto, bits: int, before: NodeProto | None) -> tuple[Any, ...]:
    if before is not None and before.domain == DOMAIN and before.op_type == "DynamicFakeQuantize":
        dynamic = _values(before)["bits"]
        note = "float products of activations that are rounded for each token"
        return node.op_type, bits, 0, True, f"w{bits}a{dynamic}", note
    return node.op_type, bits, 0, True, f"w{bits}a{bits}", "float weights and activations"


def _low_bit(node: NodeProto) -> tuple[Any, ...]:
    values = _values(node)
    bits, dynamic, block = values["weight_bits"], values["activation_bits"], values.get("block_size", 0)
    grid = ", weights on the odd grid" if values.get("weight_grid", 0) else ""
    rotated = ", inputs rotated" if "hadamard_size" in values else ""
    kind = "float activations" if dynamic == _FLOAT_ACTIVATIONS else "integers, one activation scale for each token"
    return f"{DOMAIN}::{node.op_type}", bits, block, True, f"w{bits}a{dynamic}", kind + rotated + grid


def _values(node: NodeProto) -> dict[str, int]:
    """Integer attributes of a node."""
    return {attribute.name: attribute.i for attribute in node.attribute}


def _matmul_nbits(node: NodeProto) -> tuple[Any, ...]:
    values = _values(node)
    bits, block = values.get("bits", 4), values["block_size"]
    symmetric = len(node.input) < 4 or not node.input[3]
    if values.get("accuracy_level", 0) != 4:
        return "MatMulNBits", bits, block, symmetric, f"w{bits}a16", "float activations"
    if bits == 2 and block in (16, 256):  # ONNX Runtime has no int8 kernel for these
        return "MatMulNBits", bits, block, symmetric, f"w{bits}a16", "float activations (accuracy level 4 is ignored)"
    note = "activations are quantized to int8 inside the kernel (accuracy level 4)"
    return "MatMulNBits", bits, block, symmetric, f"w{bits}a8", note


def _dequantized(
    node: NodeProto, source: NodeProto, weights: dict[str, Any], producers: dict[str, Any]
) -> tuple[Any, ...]:
    bits = _element_bits(weights[source.input[0]])
    block = next((a.i for a in source.attribute if a.name == "block_size"), 0)
    symmetric = len(source.input) < 3 or not source.input[2]
    before = producers.get(node.input[0])
    op = f"DequantizeLinear + {node.op_type}"
    if before is not None and before.op_type == "DequantizeLinear":
        return (
            op,
            bits,
            block,
            symmetric,
            f"w{bits}a8",
            "activations quantized in the graph (QDQ), scales fixed at export",
        )
    return op, bits, block, symmetric, f"w{bits}a16", "ONNX Runtime may fuse it to MatMulNBits with int8 activations"


def _element_bits(tensor: TensorProto) -> int:
    elements: int = math.prod(tensor.dims)
    return 8 * tensor_bytes(tensor) // max(1, elements)


def derived_scheme(precisions: tuple[Precision, ...]) -> str:
    """A scheme that would give such linears; "unknown" without any."""
    if not precisions:
        return "unknown"
    most = precisions[0]
    if most.weight_bits >= 16:
        return f"float{most.weight_bits}"
    if most.op.startswith(DOMAIN):
        return most.executed
    static = most.op != "MatMulNBits" and most.executed.endswith("a8")
    return f"w{most.weight_bits}a{8 if static else 16}"
