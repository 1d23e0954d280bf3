"""Lower the two linears of a gated MLP, with what combines them, to one `bdq` operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.gated_mlp import GatedMlp, bias_of, gated_mlps, halves_of, linear_of
from bdq_passes.graph_edit import remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, weight_value
from bdq_passes.low_bit_weight import (
    linear_attributes,
    linear_input,
    linear_inputs,
    read_checked,
    record_execution,
    takes_bdq,
)


@dataclass(frozen=True)
class LowerToGatedLowBitLinearPass(GraphPass):
    """Replace a merged gate and up projection and their product by `bdq::[Hadamard]GatedLowBitLinear[Bias]`.

        g, u = Split(MatMul(x, DequantizeLinear(...)) [+ bias]);  act(g) * u
        ->
        GatedLowBitLinear(x, panels, scales)  {gate: silu or gelu_tanh}

    What may stand in front of the linear, and which linears are taken, is as in `lower-to-low-bit-linear`. The halves
    must be the gate and the up projection in this order, and nobody else may read them.

    Requires QUANTIZED, ensures QUANTIZED. A second run changes nothing, so it must expect none.

    Attributes:
        expected: MLPs that must be lowered; another number is an error.
        everything: lower also what stock operators compute.
    """

    name: ClassVar[str] = "lower-to-gated-low-bit-linear"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    expected: int
    everything: bool = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the MLPs.

        Raises:
            ValueError: another number of MLPs than `expected`, or a weight that the operators do not have.
        """
        count = 0
        for mlp in gated_mlps(model):
            found = _merged(mlp)
            if found is not None and takes_bdq(found[0], self.everything):
                _lower(model, mlp, *found)
                count += 1
        if count != self.expected:
            raise ValueError(f"{count} gated MLPs were lowered to one operator, expected {self.expected}")
        return ir.passes.PassResult(model, modified=count > 0)


def _merged(mlp: GatedMlp) -> tuple[ir.Node, ir.Node | None, ir.Node] | None:
    """The linear that makes both halves, the Add of its bias, and the Split; None where there is no such linear."""
    gate, up = halves_of(mlp.gate), halves_of(mlp.up)
    if gate is None or up is None or gate[0] is not up[0] or (gate[1], up[1]) != (0, 1):
        return None
    if any(reader not in mlp.nodes for value in gate[0].outputs for reader in value.consumers()):
        return None
    found = linear_of(required_input(gate[0], 0))
    return None if found is None else (*found, gate[0])


def _lower(model: ir.Model, mlp: GatedMlp, linear: ir.Node, add: ir.Node | None, split: ir.Node) -> None:
    given, weight = linear_input(linear), read_checked(linear)
    bias = None if add is None else bias_of(add)
    base = str(weight_value(linear).name).removesuffix("_dequantized")
    inputs = linear_inputs(model, base, given, weight, 2, bias)
    attributes = {**linear_attributes(given, weight, 2), "gate": mlp.activation}
    operator = f"{'Hadamard' if given.hadamard_size else ''}GatedLowBitLinear{'' if bias is None else 'Bias'}"
    lowered = bdq_node(model, operator, inputs, attributes, str(linear.name))
    lowered.metadata_props.update(linear.metadata_props)
    product = mlp.nodes[-1]
    source, target = product.outputs[0], lowered.outputs[0]
    name, target.type, target.shape = str(source.name), source.type, source.shape
    old = [weight_value(linear), required_input(linear, 0)]
    model.graph.insert_before(linear, lowered)
    source.replace_all_uses_with(target, replace_graph_outputs=True)
    for node in (*reversed(mlp.nodes), split, *([] if add is None else [add]), linear):
        model.graph.remove(node, safe=True)
    target.name = name
    remove_unused(model, old)
    record_execution(lowered, given.bits)
