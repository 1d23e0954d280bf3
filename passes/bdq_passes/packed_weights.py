"""Read a dequantized weight back from the graph, and add the initializers of its packed form."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import array_of, initializer, required_input
from bdq_runtime.packing import ODD, PerBlock, QuantizedWeight, QuantSpec, pack_bits, pack_codes, with_blocks

SUPPORTED_BITS = (2, 4, 8)


@dataclass(frozen=True)
class PackedWeight:
    """Initializers in the layout of MatMulNBits.

    Attributes:
        codes: `[N, blocks, block_size * bits / 8]` uint8.
        scales: `[N, blocks]` float32.
        zero_points: `[N, ceil(blocks * bits / 8)]` uint8, or None.
        bits: bits of a code.
        block_size: columns that share a scale.
        weight: what was packed, by blocks.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    bits: int
    block_size: int
    weight: QuantizedWeight


def read_weight(node: ir.Node, dequantize: ir.Node) -> QuantizedWeight:
    """The quantized weight `[N, K]` that `dequantize` makes for the linear or embedding `node`; views where it can."""
    spec = note.spec(node)
    if spec is None:
        raise ValueError(f"node {node.name}: dequantized, but not annotated with bits")
    codes, scales, zeros = (array_of(required_input(dequantize, index)) for index in range(3))
    if isinstance(spec.granularity, PerBlock):
        if note.role(node) == note.LINEAR:
            scales, zeros = scales.T, zeros.T
    else:
        scales, zeros = scales[:, None], zeros[:, None]
    if note.role(node) == note.LINEAR:
        codes = codes.T
    if spec.grid == ODD:
        codes = codes >> 1
    return QuantizedWeight(codes, scales, None if spec.symmetric else zeros, spec)


def check_bits(node: ir.Node, spec: QuantSpec, op_type: str) -> None:
    """Raise unless `op_type` has a kernel for the bits of `spec`."""
    if spec.bits not in SUPPORTED_BITS:
        raise ValueError(
            f"node {node.name}: {spec.bits} bits, but {op_type} has {', '.join(map(str, SUPPORTED_BITS))}: "
            "choose one of these for the weight"
        )
    if spec.grid == ODD:
        raise ValueError(f"node {node.name}: weights on the odd grid, but {op_type} has integer zero points only")


def add_packed(model: ir.Model, base: str, weight: QuantizedWeight) -> PackedWeight:
    """The packed initializers of `weight`, named after `base`; what an earlier call of that name added is shared."""
    blocked = with_blocks(weight)
    codes = model.graph.initializers.get(f"{base}_packed")
    if codes is None:
        codes = initializer(model, f"{base}_packed", pack_codes(blocked))
    zeros = blocked.zero_points
    if zeros is not None:
        zeros = pack_bits(zeros, weight.spec.bits)
    return PackedWeight(
        codes,
        initializer(model, f"{base}_packed_scale", blocked.scales),
        None if zeros is None else initializer(model, f"{base}_packed_zero_point", zeros),
        weight.spec.bits,
        blocked.spec.block_size(blocked.codes.shape[1]),
        blocked,
    )
