"""`bdq inspect`: what is in an exported model, and in which precision it really runs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Column, Table

from bdq_export.commands.graph_roles import initializer_roles, tensor_bytes
from bdq_export.commands.layer_bits import layer_table, linear_bits
from bdq_export.commands.precisions import (
    CachePrecision,
    Precision,
    cache_precisions,
    derived_scheme,
    linear_precisions,
)
from bdq_export.commands.runtime_errors import invalid_input
from bdq_export.errors import InvalidInputError, MissingDependencyError
from bdq_export.package.metadata import read_metadata
from bdq_runtime.opset import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto


@dataclass(frozen=True)
class InspectResult:
    """An exported model.

    Attributes:
        model: the ONNX file.
        scheme: as the exporter wrote it, else derived from the linears ("derived" is then True).
        derived: whether `scheme` is a guess.
        precisions: groups of linears, the most frequent first.
        linear_bits: bits of the weights of each linear node, by its name.
        caches: groups of attention nodes, the most frequent first.
        op_library: whether the library that the model's `bdq` operators run fast with is there, in words.
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
    linear_bits: dict[str, int]
    caches: tuple[CachePrecision, ...]
    op_library: str
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
    precisions = linear_precisions(proto.graph)
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    declared = read_metadata(metadata).get("scheme")
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in proto.graph.node)
    roles: Counter[str] = Counter()
    for tensor, role in initializer_roles(proto.graph):
        roles[role] += tensor_bytes(tensor)
    return InspectResult(
        model=str(path),
        scheme=declared or derived_scheme(precisions),
        derived=declared is None,
        precisions=precisions,
        linear_bits=linear_bits(proto.graph),
        caches=cache_precisions(proto.graph),
        op_library=_op_library(opsets.get(DOMAIN)),
        file_bytes=_file_bytes(path, proto),
        role_bytes=dict(roles.most_common()),
        ops=dict(Counter(names).most_common()),
        opsets=opsets,
        metadata=metadata,
    )


def _op_library(version: int | None) -> str:
    """What is known of the op library for a model of `version` of the operators."""
    from bdq_runtime.library import LibraryError, library_info

    if version is None:
        return "not needed: stock operators only"
    try:
        found = library_info()
    except LibraryError as error:
        return f"not found, so bdq operators run as their functions, which is slower: {error}"
    if found.version < version:
        return f"too old: version {found.version}, the model's operators are of version {version}; upgrade bdq-export"
    return f"found: version {found.version}, fastest kernels {found.isas[-1]}"


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


def render(result: InspectResult) -> RenderableType:
    """Tables for a terminal."""
    about = Table("", _whole("value"), title=result.model, show_header=False, title_justify="left")
    about.add_row("scheme", result.scheme + (" (derived: the file does not say)" if result.derived else ""))
    about.add_row("op library", result.op_library)
    about.add_row("opsets", ", ".join(f"{domain} {version}" for domain, version in result.opsets.items()))
    for key, value in result.metadata.items():
        about.add_row(key, value)
    columns = ("nodes", "weights", "block", "zero points", "executed")
    linears = Table(_whole("linears"), *columns, title="executed precision")
    for group in result.precisions:
        linears.add_row(
            group.op,
            str(group.count),
            f"{group.weight_bits} bits",
            str(group.block_size or "-"),
            "no" if group.symmetric else "yes",
            f"{group.executed}: {group.note}",
        )
    headings, rows = layer_table(result.linear_bits)
    layers = Table(*headings, title="bits of the weights")
    for row in rows:
        layers.add_row(*row)
    caches = Table(_whole("attention"), "nodes", "keys", "values", "rotated", title="KV cache")
    for cache in result.caches:
        rotated = "yes" if cache.hadamard else "no"
        caches.add_row(cache.op, str(cache.count), f"{cache.key_bits} bits", f"{cache.value_bits} bits", rotated)
    sizes = Table(_whole("bytes of"), "MB", title="sizes")
    for name, size in (*result.file_bytes.items(), *result.role_bytes.items()):
        sizes.add_row(name, f"{size / 1e6:,.2f}")
    ops = Table(_whole("operator"), "nodes", title="operators")
    for name, count in result.ops.items():
        ops.add_row(name, str(count))
    return Group(about, linears, *([layers] if rows else []), caches, sizes, ops)


def _whole(heading: str) -> Column:
    """A column of names, which tell operators apart by their ends: they go on in the next line."""
    return Column(heading, overflow="fold")
