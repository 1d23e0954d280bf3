"""Replace float weights by their codes and a DequantizeLinear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import initializer, remove_unused
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, weight_value
from bdq_runtime.packing import ODD, PerBlock, QuantizedWeight, concatenate_rows


@dataclass(frozen=True)
class InsertWeightQuantizationPass(GraphPass):
    """Feed each linear and each embedding that has a quantized weight from a DequantizeLinear.

        MatMul(x, W)    ->  MatMul(x, DequantizeLinear(codes [K, N], scales [blocks, N], zero points))
        Gather(E, ids)  ->  Gather(DequantizeLinear(codes [V, K], scales [V, blocks], zero points), ids)

    On the odd grid the codes are twice the weight's, around `2^bits - 1`.
    With one scale a row the scales are `[N]` and the axis is that of the rows. Codes are unpacked uint8, transposed
    views of the arrays given: nothing is copied but the rows of a linear that packs several. The parts of such a
    linear share one spec (`split-mixed-linears` runs first where they do not). What has no quantized weight stays
    float and is annotated as kept. A tied lm_head takes the embedding's weight unless it has its own.

    Requires ANNOTATED, ensures QUANTIZED. A second run is a precondition error: the graph is no longer float.

    Attributes:
        weights: by canonical name, `<logical path>.weight`; each must be used.
        expected: linears that must come out quantized; another number is an error.
    """

    name: ClassVar[str] = "insert-weight-quantization"
    takes: ClassVar[Level] = Level.ANNOTATED
    gives: ClassVar[Level] = Level.QUANTIZED

    weights: Mapping[str, QuantizedWeight] = field(repr=False)
    expected: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the dequantizers.

        Raises:
            ValueError: a shape that is not the float weight's, parts that do not share a spec, weights that no node
                uses, or another number of linears than `expected`.
        """
        used: set[str] = set()
        count = 0
        for node in note.with_role(model, note.LINEAR):
            names = self._names(node)
            count += self._decide(model, node, names)
            used.update(names)
        for node in note.with_role(model, note.EMBEDDING):
            table = str(weight_value(node).name)
            self._decide(model, node, (table,) if table in self.weights else ())
            used.add(table)
        unused = sorted(set(self.weights) - used)
        if unused:
            raise ValueError(f"{len(unused)} quantized weights have no node in the graph, the first is {unused[0]}")
        if count != self.expected:
            raise ValueError(f"{count} linears were quantized, expected {self.expected}")
        return ir.passes.PassResult(model, modified=True)

    def _names(self, node: ir.Node) -> tuple[str, ...]:
        """Canonical names of the quantized weights of a linear; empty where it stays float."""
        names = tuple(f"{part}.weight" for part in note.parts(node))
        found = tuple(name for name in names if name in self.weights)
        embedding = note.tied(node)
        if embedding is not None and found:
            note.clear_tied(node)
        elif embedding is not None and embedding in self.weights:
            return (embedding,)
        if found and (len(found) < len(names) or len({self.weights[name].spec for name in names}) > 1):
            raise ValueError(f"node {node.name}: its parts {names} differ in precision: run split-mixed-linears first")
        return found

    def _decide(self, model: ir.Model, node: ir.Node, names: tuple[str, ...]) -> bool:
        """Quantize one node from the weights `names`, or keep it; whether it was quantized."""
        if not names:
            note.set_kept(node)
            return False
        parts = [self.weights[name] for name in names]
        weight = parts[0] if len(parts) == 1 else concatenate_rows(parts)
        _dequantize(model, node, weight, transposed=note.role(node) == note.LINEAR)
        note.set_spec(node, weight.spec)
        return True


def _dequantize(model: ir.Model, node: ir.Node, weight: QuantizedWeight, *, transposed: bool) -> None:
    """Put a DequantizeLinear in the place of the float weight of `node`."""
    old = weight_value(node)
    base = str(old.name)
    shape = weight.codes.T.shape if transposed else weight.codes.shape
    if old.shape is None or tuple(old.shape) != shape:
        raise ValueError(f"node {node.name}: the quantized weight is {shape}, expected {old.shape}")
    codes, zeros = weight.codes, weight.zero_points
    if weight.spec.grid == ODD:
        codes, zeros = 2 * codes, np.broadcast_to(np.uint8((1 << weight.spec.bits) - 1), weight.scales.shape)
    elif zeros is None:
        zeros = np.broadcast_to(np.uint8(1 << (weight.spec.bits - 1)), weight.scales.shape)
    attributes = {"axis": 1 if transposed else 0}
    if isinstance(weight.spec.granularity, PerBlock):
        attributes = {"axis": 0 if transposed else 1, "block_size": weight.spec.granularity.size}
        scales, zeros = (weight.scales.T, zeros.T) if transposed else (weight.scales, zeros)
    else:
        scales, zeros = weight.scales[:, 0], zeros[:, 0]
    inputs = [
        initializer(model, f"{base}_codes", codes.T if transposed else codes),
        initializer(model, f"{base}_scale", scales),
        initializer(model, f"{base}_zero_point", zeros),
    ]
    dequantize = ir.node("DequantizeLinear", inputs, attributes, name=f"{base}/dequantize")
    output = dequantize.outputs[0]
    output.name, output.type, output.shape = f"{base}_dequantized", ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    model.graph.insert_before(node, dequantize)
    node.replace_input_with(node.inputs.index(old), output)
    remove_unused(model, [old])
