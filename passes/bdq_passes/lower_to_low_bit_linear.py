"""Lower linears to the `bdq` operators that multiply integers of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.graph_edit import absorb, bias_add, remove_unused, replace_node, required_input
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
class LowerToLowBitLinearPass(GraphPass):
    """Replace MatMul on a dequantized weight by `bdq::[Hadamard]LowBitLinear[Bias]`.

        MatMul(DynamicFakeQuantize(Hadamard(x) * diagonal), DequantizeLinear(codes [K, N], scales)) [+ bias]
        ->
        HadamardLowBitLinearBias(x, diagonal, panels, scales, bias)

    1. Any of the three nodes in front may be missing: float activations, no diagonal, no transform.
    2. An Add of an `[N]` initializer that alone reads the result becomes the bias.
    3. Scales must be exact in float16, and the weights symmetric.
    4. A linear that a stock operator computes, float activations included, is left to it unless `everything` is set.

    Requires QUANTIZED, ensures QUANTIZED, and LOWERED as far as these linears go. A second run changes nothing.

    Attributes:
        everything: lower also what a stock operator computes.
    """

    name: ClassVar[str] = "lower-to-low-bit-linear"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    everything: bool = False

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower the linears.

        Raises:
            ValueError: a weight that the operators do not have (see `read_checked`).
        """
        nodes = [node for node in note.with_role(model, note.LINEAR) if takes_bdq(node, self.everything)]
        for node in nodes:
            _lower(model, node)
        return ir.passes.PassResult(model, modified=bool(nodes))


def _lower(model: ir.Model, node: ir.Node) -> None:
    given, weight, added = linear_input(node), read_checked(node), bias_add(node)
    bias = None if added is None else added[1]
    base = note.tied(node) or str(weight_value(node).name).removesuffix("_dequantized")
    inputs = linear_inputs(model, base, given, weight, 1, bias)
    operator = f"{'Hadamard' if given.hadamard_size else ''}LowBitLinear{'' if bias is None else 'Bias'}"
    lowered = bdq_node(model, operator, inputs, linear_attributes(given, weight, 1), str(node.name))
    old = [weight_value(node), required_input(node, 0)]
    replace_node(node, lowered)
    remove_unused(model, old)
    if added is not None:
        absorb(lowered, added[0])
    record_execution(lowered, given.bits)
