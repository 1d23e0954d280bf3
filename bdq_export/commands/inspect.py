"""`bdq inspect`: what is in an exported model, and in which precision it really runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from bdq_export.commands.graph_roles import initializer_roles, tensor_bytes
from bdq_export.commands.runtime_errors import invalid_input
from bdq_export.errors import InvalidInputError, MissingDependencyError
from bdq_export.package.metadata import read_metadata

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_FLOAT_MATMULS = ("MatMul", "Gemm", "FusedMatMul")


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
class InspectResult:
    """An exported model.

    Attributes:
        model: the ONNX file.
        scheme: as the exporter wrote it, else derived from the linears ("derived" is then True).
        derived: whether `scheme` is a guess.
        precisions: groups of linears, the most frequent first.
        file_bytes: size of each file of the model.
        role_bytes: bytes of the weights by role, the largest first.
        ops: nodes by operator, the most frequent first; contrib operators with their domain.
        opsets: version of each operator domain.
        metadata: `metadata_props` of the file.
    """

    model: str
    scheme: str
    derived: bool
    precisions: tuple[Precision, ...]
    file_bytes: dict[str, int]
    role_bytes: dict[str, int]
    ops: dict[str, int]
    opsets: dict[str, int]
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def inspect(model: str | Path) -> InspectResult:
    """Describe `model` without running it.

    Args:
        model: `OUT.onnx`, or a folder that holds `model.onnx`.

    Raises:
        InvalidInputError: no such file, no ONNX model, or a data file that is missing.
        MissingDependencyError: onnx is not installed.
    """
    from bdq_runtime.folder import ModelFolder

    with invalid_input():
        path = ModelFolder.of(model).model
    proto = _load(path)
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    precisions = _precisions(proto.graph)
    declared = read_metadata(metadata).get("scheme")
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in proto.graph.node)
    roles: Counter[str] = Counter()
    for tensor, role in initializer_roles(proto.graph):
        roles[role] += tensor_bytes(tensor)
    return InspectResult(
        model=str(path),
        scheme=declared or _derived_scheme(precisions),
        derived=declared is None,
        precisions=precisions,
        file_bytes=_file_bytes(path, proto),
        role_bytes=dict(roles.most_common()),
        ops=dict(Counter(names).most_common()),
        opsets={entry.domain or "ai.onnx": entry.version for entry in proto.opset_import},
        metadata=metadata,
    )


def _load(path: Path) -> ModelProto:
    try:
        import onnx

        decode_error = import_module("google.protobuf.message").DecodeError  # onnx raises it and does not export it
    except ImportError as error:
        raise MissingDependencyError(
            f'inspecting needs the package {error.name}; install it with: pip install "bdq-export[export]"'
        ) from None
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (decode_error, OSError) as error:
        raise InvalidInputError(f"{path} is not an ONNX model ({error}); export it again") from None
    if not proto.graph.node:
        raise InvalidInputError(f"{path} is not an ONNX model (it has no nodes); export it again")
    return proto


def _file_bytes(path: Path, proto: ModelProto) -> dict[str, int]:
    files = {path.name: path.stat().st_size}
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value not in files:
                data = path.parent / entry.value
                if not data.is_file():
                    raise InvalidInputError(f"data file {data} is missing; keep it beside {path.name}")
                files[entry.value] = data.stat().st_size
    return files


def _precisions(graph: GraphProto) -> tuple[Precision, ...]:
    found = Counter(_node_precisions(graph))
    return tuple(Precision(op, count, *rest) for (op, *rest), count in found.most_common())


def _node_precisions(graph: GraphProto) -> Iterator[tuple[Any, ...]]:
    """Of each linear: op, weight bits, block size, symmetric, executed, note."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            yield _matmul_nbits(node)
        elif node.op_type == "QLinearMatMul":
            yield "QLinearMatMul", 8, 0, True, "w8a8", "8-bit integers, activation scales fixed at export"
        elif node.op_type in _FLOAT_MATMULS and len(node.input) > 1:
            source = producers.get(node.input[1])
            if node.input[1] in weights:
                bits = _element_bits(weights[node.input[1]])
                yield node.op_type, bits, 0, True, f"w{bits}a{bits}", "float weights and activations"
            elif source is not None and source.op_type == "DequantizeLinear" and source.input[0] in weights:
                yield _dequantized(node, source, weights, producers)


def _matmul_nbits(node: NodeProto) -> tuple[Any, ...]:
    values = {attribute.name: attribute.i for attribute in node.attribute}
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


def _derived_scheme(precisions: tuple[Precision, ...]) -> str:
    if not precisions:
        return "unknown"
    most = precisions[0]
    if most.weight_bits >= 16:
        return f"float{most.weight_bits}"
    static = most.op != "MatMulNBits" and most.executed.endswith("a8")
    return f"w{most.weight_bits}a{8 if static else 16}"


def render(result: InspectResult) -> RenderableType:
    """Tables for a terminal."""
    about = Table(title=result.model, show_header=False, title_justify="left")
    about.add_row("scheme", result.scheme + (" (derived: the file does not say)" if result.derived else ""))
    about.add_row("opsets", ", ".join(f"{domain} {version}" for domain, version in result.opsets.items()))
    for key, value in result.metadata.items():
        about.add_row(key, value)
    linears = Table("linears", "nodes", "weights", "block", "zero points", "executed", title="executed precision")
    for group in result.precisions:
        linears.add_row(
            group.op,
            str(group.count),
            f"{group.weight_bits} bits",
            str(group.block_size or "-"),
            "no" if group.symmetric else "yes",
            f"{group.executed}: {group.note}",
        )
    sizes = Table("bytes of", "MB", title="sizes")
    for name, size in (*result.file_bytes.items(), *result.role_bytes.items()):
        sizes.add_row(name, f"{size / 1e6:,.2f}")
    ops = Table("operator", "nodes", title="operators")
    for name, count in result.ops.items():
        ops.add_row(name, str(count))
    return Group(about, linears, sizes, ops)
