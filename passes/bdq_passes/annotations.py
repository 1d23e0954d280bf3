"""The metadata that passes leave on nodes: the only module that spells the keys.

| key              | on                 | value                                                              |
| ---------------- | ------------------ | ------------------------------------------------------------------ |
| `bdq.parts`      | a linear's MatMul  | logical module paths in column order, comma-separated              |
| `bdq.tied`       | lm_head's MatMul   | the embedding initializer whose transpose is its weight            |
| `bdq.role`       | MatMul, Gather     | `linear` or `embedding`: set by annotate-linears; `online`: a      |
|                  |                    | product in front of a linear, set by insert-online-transforms      |
| `bdq.linears`    | the graph          | how many nodes carry the role `linear`                             |
| `bdq.bits`       | linear, embedding  | bits of its codes; absent while float                              |
| `bdq.block_size` | linear, embedding  | columns that share a scale, or `channel`                           |
| `bdq.symmetric`  | linear, embedding  | `true` or `false`                                                  |
| `bdq.grid`       | linear             | `odd`; absent on the integer grid                                  |
| `bdq.kept`       | linear, embedding  | `float`: decided to stay unquantized                               |
| `bdq.activations` | linear            | `uint8`: static per-tensor activations were inserted               |
| `bdq.activation_bits` | linear        | bits of dynamic activations, one scale a token; absent while float |
| `bdq.executed`   | a lowered linear   | type in which the kernel multiplies: `float32` or `int8`           |

They are saved with the file, so that `bdq inspect` reads what was decided and what is executed.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from bdq_runtime.packing import INTEGER, PerBlock, PerChannel, QuantSpec

PREFIX = "bdq."
PARTS = "bdq.parts"
TIED = "bdq.tied"
ROLE = "bdq.role"
LINEARS = "bdq.linears"
BITS = "bdq.bits"
BLOCK_SIZE = "bdq.block_size"
SYMMETRIC = "bdq.symmetric"
GRID = "bdq.grid"
KEPT = "bdq.kept"
ACTIVATIONS = "bdq.activations"
ACTIVATION_BITS = "bdq.activation_bits"
EXECUTED = "bdq.executed"

LINEAR = "linear"
EMBEDDING = "embedding"
ONLINE = "online"
_CHANNEL = "channel"


def parts(node: ir.Node) -> tuple[str, ...]:
    """Logical module paths whose rows make up the weight of a linear; empty where it is none."""
    text = node.metadata_props.get(PARTS, "")
    return tuple(part.strip() for part in text.split(",")) if text else ()


def set_parts(node: ir.Node, paths: tuple[str, ...]) -> None:
    """Name the logical modules of a linear, in column order."""
    node.metadata_props[PARTS] = ",".join(paths)


def tied(node: ir.Node) -> str | None:
    """Name of the embedding initializer that a tied lm_head shares, or None."""
    return node.metadata_props.get(TIED)


def set_tied(node: ir.Node, embedding: str) -> None:
    """Say that the weight of `node` is the transpose of the initializer `embedding`."""
    node.metadata_props[TIED] = embedding


def clear_tied(node: ir.Node) -> None:
    """Say that the weight of `node` is its own."""
    node.metadata_props.pop(TIED, None)


def role(node: ir.Node) -> str | None:
    """`linear`, `embedding`, `online` or None."""
    return node.metadata_props.get(ROLE)


def set_role(node: ir.Node, value: str) -> None:
    """Mark a node as `linear`, `embedding` or `online`."""
    node.metadata_props[ROLE] = value


def with_role(model: ir.Model, value: str) -> Iterator[ir.Node]:
    """Nodes of the main graph that carry the role `value`, in graph order; safe while nodes are replaced."""
    return iter([node for node in model.graph if role(node) == value])


def linear_count(model: ir.Model) -> int | None:
    """How many linears were annotated, or None before annotate-linears."""
    text = model.graph.metadata_props.get(LINEARS)
    return None if text is None else int(text)


def set_linear_count(model: ir.Model, count: int) -> None:
    """Record how many linears the graph has."""
    model.graph.metadata_props[LINEARS] = str(count)


def spec(node: ir.Node) -> QuantSpec | None:
    """How the weight of a linear or embedding is quantized, or None while it is float."""
    if BITS not in node.metadata_props:
        return None
    block = node.metadata_props[BLOCK_SIZE]
    return QuantSpec(
        bits=int(node.metadata_props[BITS]),
        granularity=PerChannel() if block == _CHANNEL else PerBlock(int(block)),
        symmetric=node.metadata_props[SYMMETRIC] == "true",
        grid=node.metadata_props.get(GRID, INTEGER),
    )


def set_spec(node: ir.Node, value: QuantSpec) -> None:
    """Record how the weight of a linear or embedding is quantized."""
    granularity = value.granularity
    node.metadata_props[BITS] = str(value.bits)
    node.metadata_props[BLOCK_SIZE] = str(granularity.size) if isinstance(granularity, PerBlock) else _CHANNEL
    node.metadata_props[SYMMETRIC] = "true" if value.symmetric else "false"
    if value.grid != INTEGER:
        node.metadata_props[GRID] = value.grid


def is_kept(node: ir.Node) -> bool:
    """Whether the weight was decided to stay float."""
    return KEPT in node.metadata_props


def set_kept(node: ir.Node) -> None:
    """Record that the weight stays float."""
    node.metadata_props[KEPT] = "float"


def has_static_activations(node: ir.Node) -> bool:
    """Whether static activation quantization was inserted around a linear."""
    return ACTIVATIONS in node.metadata_props


def set_static_activations(node: ir.Node) -> None:
    """Record that a linear's input and output are static per-tensor uint8."""
    node.metadata_props[ACTIVATIONS] = "uint8"


def activation_bits(node: ir.Node) -> int | None:
    """Bits of the dynamic per-token activations of a linear, or None while they are float."""
    text = node.metadata_props.get(ACTIVATION_BITS)
    return None if text is None else int(text)


def set_activation_bits(node: ir.Node, bits: int) -> None:
    """Record that a linear's input is quantized with one dynamic scale a token."""
    node.metadata_props[ACTIVATION_BITS] = str(bits)


def executed(node: ir.Node) -> str | None:
    """The type in which the kernel of a lowered linear multiplies, or None before lowering."""
    return node.metadata_props.get(EXECUTED)


def set_executed(node: ir.Node, precision: str) -> None:
    """Record the type in which the kernel multiplies: `float32` or `int8`."""
    node.metadata_props[EXECUTED] = precision
