"""Put static quantization around linears: the form of integer deployment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import array_of, bias_add, initializer, remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, dequantizer
from bdq_runtime.packing import PerChannel, QuantSpec

Range = tuple[float, float, float, float]
"""Smallest and largest input, smallest and largest output of a linear."""

_WEIGHT_SPEC = QuantSpec(8, PerChannel(), symmetric=True)


@dataclass(frozen=True)
class InsertActivationQuantizationPass(GraphPass):
    """Quantize inputs and outputs of linears to uint8 with one scale a tensor, and their weights to int8.

        MatMul(x, DequantizeLinear(codes uint8, scales, 128))
        ->
        DQ(Q(MatMul(DQ(Q(x)), DequantizeLinear(codes int8, scales, 0))))        Q, DQ: {Quantize,Dequantize}Linear

    Scale and zero point cover the range and zero: `scale = (max(high, 0) - min(low, 0)) / 255`. Linears that read one
    tensor with one range share its Q and DQ. The output range of a linear with a bias includes the bias; the product
    is quantized before the bias is added, in the range `[low - max bias, high - min bias]`, which contains it.

    On x86 without VNNI, ONNX Runtime's uint8 x int8 kernel saturates sums of two products: results differ there.

    Requires QUANTIZED with weights of 8 bits, symmetric, one scale a row; ensures QUANTIZED. A second run changes
    nothing.

    Attributes:
        ranges: by node name (the module path); each must be used. Linears without a range keep float activations.
    """

    name: ClassVar[str] = "insert-activation-quantization"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    ranges: Mapping[str, Range] = field(repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs.

        Raises:
            ValueError: a range without a linear, a range that is not finite or upside down, or weights of another spec.
        """
        linears = {str(node.name): node for node in note.with_role(model, note.LINEAR)}
        unknown = sorted(set(self.ranges) - set(linears))
        if unknown:
            raise ValueError(f"{len(unknown)} ranges have no linear in the graph, the first is {unknown[0]}")
        modified = False
        for name, bounds in self.ranges.items():
            node = linears[name]
            if note.has_static_activations(node):
                continue
            _quantize_weight(model, node)
            _quantize_input(model, node, _affine(name, *bounds[:2]))
            _quantize_output(model, node, bounds[2:])
            note.set_static_activations(node)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _affine(name: str, low: float, high: float) -> tuple[np.float32, np.uint8]:
    """Scale and zero point of uint8 codes that cover `[low, high]` and represent zero exactly."""
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise ValueError(f"linear {name}: activation range [{low}, {high}] is not a finite range")
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / 255) if high > low else np.float32(1)
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, 255))


def _quantize_weight(model: ir.Model, node: ir.Node) -> None:
    """Turn the unsigned codes around 128 of a linear's weight into signed ones around 0."""
    dequantize = dequantizer(node)
    if dequantize is None or note.spec(node) != _WEIGHT_SPEC:
        raise ValueError(f"node {node.name}: weights are {note.spec(node)}, static activations need {_WEIGHT_SPEC}")
    codes, scales, zeros = (required_input(dequantize, index) for index in range(3))
    base = str(codes.name).removesuffix("_codes")
    signed = (array_of(codes) ^ np.uint8(0x80)).view(np.int8)
    dequantize.replace_input_with(0, initializer(model, f"{base}_codes_int8", signed))
    dequantize.replace_input_with(
        2, initializer(model, f"{base}_zero_point_int8", np.zeros(array_of(scales).shape, np.int8))
    )
    remove_unused(model, [codes, zeros])


def _quantize_input(model: ir.Model, node: ir.Node, affine: tuple[np.float32, np.uint8]) -> None:
    value = required_input(node, 0)
    for reader in value.consumers():
        if reader.op_type == "QuantizeLinear" and _same(reader, affine):
            node.replace_input_with(0, reader.outputs[0].consumers()[0].outputs[0])
            return
    pair = _pair(model, value, f"{node.name}/input", affine)
    model.graph.insert_before(node, pair)
    node.replace_input_with(0, pair[-1].outputs[0])


def _same(quantize: ir.Node, affine: tuple[np.float32, np.uint8]) -> bool:
    return all(array_of(required_input(quantize, index + 1)) == affine[index] for index in range(2))


def _quantize_output(model: ir.Model, node: ir.Node, bounds: tuple[float, ...]) -> None:
    value = node.outputs[0]
    readers = value.uses()
    low, high = bounds
    added = bias_add(node)
    if added is not None:
        bias = array_of(added[1])
        low, high = low - float(bias.max()), high - float(bias.min())
    pair = _pair(model, value, f"{node.name}/output", _affine(str(node.name), low, high))
    model.graph.insert_after(node, pair)
    result = pair[-1].outputs[0]
    if value.is_graph_output():
        name, value.name = value.name, f"{node.name}/product"
        result.name = name
        model.graph.outputs[list(model.graph.outputs).index(value)] = result
    for reader, index in readers:
        reader.replace_input_with(index, result)


def _pair(model: ir.Model, value: ir.Value, name: str, affine: tuple[np.float32, np.uint8]) -> list[ir.Node]:
    """QuantizeLinear and DequantizeLinear of `value`."""
    scale = initializer(model, f"{name}_scale", np.array(affine[0]))
    zero = initializer(model, f"{name}_zero_point", np.array(affine[1]))
    quantize = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}/quantize")
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], scale, zero], name=f"{name}/dequantize")
    for node, data_type in ((quantize, ir.DataType.UINT8), (dequantize, ir.DataType.FLOAT)):
        node.outputs[0].name = f"{node.name}/output"
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(data_type), value.shape
    return [quantize, dequantize]
