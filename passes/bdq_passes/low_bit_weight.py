"""What the lowering to `bdq` linear operators shares: the linear that is lowered, and its inputs and attributes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import is_bdq
from bdq_passes.graph_edit import initializer, required_input
from bdq_passes.levels import dequantizer
from bdq_passes.packed_weights import SUPPORTED_BITS, read_weight
from bdq_runtime.opset import BLOCK_SIZES, Attribute
from bdq_runtime.packing import ODD, PerBlock, QuantizedWeight
from bdq_runtime.panels import interleave_panels, pack_panels, pack_scales

_FLOAT_ACTIVATIONS = 16


@dataclass(frozen=True, eq=False)
class LinearInput:
    """What stands in front of a linear.

    Attributes:
        x: the input before any of it.
        hadamard_size: of the Hadamard transform, 0 for none.
        hadamard_interleave: runs of channels that take turns before it.
        diagonal: `[K]`, or None; only with a Hadamard transform.
        bits: of the activations; 16 for float.
        clip: of the activations.
    """

    x: ir.Value
    hadamard_size: int = 0
    hadamard_interleave: int = 1
    diagonal: ir.Value | None = None
    bits: int = _FLOAT_ACTIVATIONS
    clip: float = 1.0


def linear_input(node: ir.Node) -> LinearInput:
    """Read the nodes that `insert-online-transforms` and `insert-token-quantization` put in front of a linear."""
    x, bits, clip = required_input(node, 0), _FLOAT_ACTIVATIONS, 1.0
    quantize = x.producer()
    if quantize is not None and is_bdq(quantize, "DynamicFakeQuantize"):
        x, bits, clip = required_input(quantize, 0), _int(quantize, "bits"), quantize.attributes["clip"].as_float()
    producer = x.producer()
    if producer is not None and is_bdq(producer, "Hadamard"):
        return _rotated_input(producer, None, bits, clip)
    if producer is not None and producer.op_type == "Mul":
        rotated, diagonal = required_input(producer, 0), required_input(producer, 1)
        hadamard = rotated.producer()
        if hadamard is not None and is_bdq(hadamard, "Hadamard") and diagonal.is_initializer():
            return _rotated_input(hadamard, diagonal, bits, clip)
    return LinearInput(x, bits=bits, clip=clip)


def _rotated_input(hadamard: ir.Node, diagonal: ir.Value | None, bits: int, clip: float) -> LinearInput:
    size, interleave = _int(hadamard, "size"), _int(hadamard, "interleave")
    return LinearInput(required_input(hadamard, 0), size, interleave, diagonal, bits, clip)


def takes_bdq(node: ir.Node, everything: bool) -> bool:
    """Whether a linear is to be lowered to a `bdq` operator: no stock operator computes it, or `everything` is."""
    spec = note.spec(node)
    if spec is None or dequantizer(node) is None or note.has_static_activations(node):
        return False
    stock = spec.bits in SUPPORTED_BITS and spec.grid != ODD and linear_input(node).bits == _FLOAT_ACTIVATIONS
    return everything or not stock


def read_checked(node: ir.Node) -> QuantizedWeight:
    """The quantized weight `[N, K]` of a linear that `takes_bdq`.

    Raises:
        ValueError: a block size without a kernel, zero points, or scales that float16 does not represent exactly.
    """
    dequantize = dequantizer(node)
    assert dequantize is not None, "the linear reads a dequantized weight"
    weight = read_weight(node, dequantize)
    block = _block(weight)
    if block not in BLOCK_SIZES:
        raise ValueError(f"node {node.name}: block size {block}, but the bdq operators have {BLOCK_SIZES}")
    if weight.zero_points is not None:
        raise ValueError(f"node {node.name}: zero points, but the bdq operators have symmetric weights only")
    if not np.array_equal(weight.scales.astype(np.float16).astype(np.float32), weight.scales):
        raise ValueError(f"node {node.name}: scales are not exact in float16: round them before codes are computed")
    return weight


def linear_inputs(
    model: ir.Model, base: str, given: LinearInput, weight: QuantizedWeight, halves: int, bias: ir.Value | None
) -> list[ir.Value]:
    """Inputs of a linear operator, in the order of the table.

    Args:
        model: gets the initializers.
        base: what the initializers of the weight are called after.
        given: what stands in front of the linear.
        weight: `[N, K]`.
        halves: 2 for a gated linear, whose first half of the rows is the gate.
        bias: `[N]` or None.
    """
    front = [given.x]
    if given.hadamard_size:
        columns = weight.codes.shape[1]
        ones = given.diagonal or initializer(model, f"{base}/no_diagonal", np.ones(columns, np.float32))
        front.append(ones)
    panels = [initializer(model, f"{base}_panels", _panels(weight, halves))]
    panels.append(initializer(model, f"{base}_panel_scales", _panel_scales(weight, halves)))
    return [*front, *panels, *([] if bias is None else [bias])]


def linear_attributes(given: LinearInput, weight: QuantizedWeight, halves: int) -> dict[str, Attribute]:
    """Attributes of a linear operator, but for the gate."""
    rows, columns = weight.codes.shape
    attributes: dict[str, Attribute] = {
        "K": columns,
        "N": rows // halves,
        "weight_bits": weight.spec.bits,
        "weight_grid": int(weight.spec.grid == ODD),
        "block_size": _block(weight),
        "activation_bits": given.bits,
        "activation_clip": given.clip,
    }
    if given.hadamard_size:
        attributes["hadamard_size"] = given.hadamard_size
        attributes["hadamard_interleave"] = given.hadamard_interleave
    return attributes


def record_execution(node: ir.Node, bits: int) -> None:
    """Annotate a lowered node with what it computes in."""
    note.set_executed(node, "float32" if bits == _FLOAT_ACTIVATIONS else "int8")


def _panels(weight: QuantizedWeight, halves: int) -> npt.NDArray[np.uint8]:
    parts = [pack_panels(part, weight.spec.bits) for part in np.split(weight.codes, halves)]
    return parts[0] if halves == 1 else interleave_panels(*parts)


def _panel_scales(weight: QuantizedWeight, halves: int) -> npt.NDArray[np.float16]:
    parts = [pack_scales(part) for part in np.split(weight.scales, halves)]
    return parts[0] if halves == 1 else interleave_panels(*parts)


def _block(weight: QuantizedWeight) -> int:
    granularity = weight.spec.granularity
    return granularity.size if isinstance(granularity, PerBlock) else 0


def _int(node: ir.Node, attribute: str) -> int:
    return node.attributes[attribute].as_int()
