"""What an initializer of an ONNX graph is for, told from the nodes that read it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bdq_runtime.opset import OPERATORS

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

_SCALES = "scales"
_ZERO_POINTS = "zero points"
_ROLES: dict[str, dict[int, str]] = {
    "Gather": {0: "embedding"},
    "GatherBlockQuantized": {0: "embedding", 2: _SCALES, 3: _ZERO_POINTS},
    "MatMul": {0: "linears", 1: "linears"},
    "FusedMatMul": {0: "linears", 1: "linears"},
    "Gemm": {1: "linears", 2: "biases"},
    "MatMulNBits": {1: "linears", 2: _SCALES, 3: _ZERO_POINTS, 5: "biases"},
    "QLinearMatMul": {
        1: _SCALES,
        2: _ZERO_POINTS,
        3: "linears",
        4: _SCALES,
        5: _ZERO_POINTS,
        6: _SCALES,
        7: _ZERO_POINTS,
    },
    "DequantizeLinear": {1: _SCALES, 2: _ZERO_POINTS},
    "QuantizeLinear": {1: _SCALES, 2: _ZERO_POINTS},
    "GroupQueryAttention": {7: "rotary tables", 8: "rotary tables", 12: _SCALES, 13: _SCALES},
    "RotaryEmbedding": {1: "rotary tables", 2: "rotary tables", 3: "rotary tables"},
    "Add": {0: "biases", 1: "biases"},
}
_BDQ_ROLES = {
    "weight": "linears",
    "scales": _SCALES,
    "bias": "biases",
    "diagonal": "online transforms",
    "cos_cache": "rotary tables",
    "sin_cache": "rotary tables",
}
_ROLES |= {
    name: {index: _BDQ_ROLES[each] for index, each in enumerate(operator.inputs) if each in _BDQ_ROLES}
    for name, operator in OPERATORS.items()
}
_NORM_OPS = ("RMSNormalization", "LayerNormalization")
_THROUGH = ("Cast", "Reshape", "Transpose", "Identity", "DequantizeLinear", "Slice", "Squeeze", "Unsqueeze")
_LM_HEAD = "lm_head"


def initializer_roles(graph: GraphProto) -> Iterator[tuple[TensorProto, str]]:
    """Each initializer with its role; "other" where no reader tells.

    A weight that both the embedding and the output read is "embedding and lm_head".
    """
    readers: dict[str, list[tuple[NodeProto, int]]] = defaultdict(list)
    for node in graph.node:
        for index, name in enumerate(node.input):
            readers[name].append((node, index))
    for tensor in graph.initializer:
        roles = set(_roles(tensor.name, readers, {output.name for output in graph.output}, depth=4))
        if len(tensor.dims) < 2:  # a table of indices or sizes that a Gather reads is no embedding
            roles.discard("embedding")
        if {"embedding", _LM_HEAD} <= roles:
            yield tensor, f"embedding and {_LM_HEAD}"
        else:
            yield tensor, min(roles, default="other")


def _roles(name: str, readers: dict[str, list[tuple[NodeProto, int]]], outputs: set[str], depth: int) -> Iterator[str]:
    for node, index in readers.get(name, ()):
        if node.op_type in _THROUGH and index == 0 and depth:
            for output in node.output:
                yield from _roles(output, readers, outputs, depth - 1)
        elif is_online(node):
            yield _BDQ_ROLES["diagonal"]
        elif node.op_type.endswith(_NORM_OPS) and index:
            yield "norms"
        elif role := _ROLES.get(node.op_type, {}).get(index):
            head = _LM_HEAD in node.name or bool(outputs & set(node.output))
            yield _LM_HEAD if role == "linears" and head else role


def is_online(node: NodeProto) -> bool:
    """Whether a product is part of a transform in front of a linear (`bdq_passes.annotations`), not a linear itself."""
    return any(entry.key == "bdq.role" and entry.value == "online" for entry in node.metadata_props)


def tensor_bytes(tensor: TensorProto) -> int:
    """Bytes of the elements of `tensor`, wherever they are stored."""
    from onnx import TensorProto

    four = {TensorProto.INT4, TensorProto.UINT4, getattr(TensorProto, "FLOAT4E2M1", -1)}
    two = {getattr(TensorProto, "INT2", -2), getattr(TensorProto, "UINT2", -2)}
    elements: int = math.prod(tensor.dims)
    if tensor.data_type in four or tensor.data_type in two:
        return -(-elements // (2 if tensor.data_type in four else 4))
    from onnx.helper import tensor_dtype_to_np_dtype

    size: int = tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return elements * size
