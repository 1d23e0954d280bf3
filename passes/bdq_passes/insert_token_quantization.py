"""Quantize the inputs of linears when the model runs, with one scale a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.graph_edit import required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level
from bdq_runtime.opset import ACTIVATION_BITS
from bdq_runtime.specs import ActivationQuantization

_FLOAT_BITS = 16


@dataclass(frozen=True)
class InsertTokenQuantizationPass(GraphPass):
    """Round the inputs of linears to a few bits.

        MatMul(x, W)  ->  MatMul(bdq::DynamicFakeQuantize(x), W)

    A linear with quantized weights is then lowered to an operator that multiplies the integers; one with float
    weights stays as it is. Linears of one input and one specification share the node.

    Requires QUANTIZED, ensures QUANTIZED.

    Attributes:
        activations: by node name (the module path); each must be used. Other linears keep float inputs.
    """

    name: ClassVar[str] = "insert-token-quantization"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    activations: Mapping[str, ActivationQuantization] = field(repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the nodes.

        Raises:
            ValueError: a specification without a linear, or bits or a clip that the operator does not have.
        """
        linears = {str(node.name): node for node in note.with_role(model, note.LINEAR)}
        unknown = sorted(set(self.activations) - set(linears))
        if unknown:
            raise ValueError(f"{len(unknown)} activation quantizations have no linear, the first is of {unknown[0]}")
        made: dict[tuple[ir.Value, ActivationQuantization], ir.Value] = {}
        for name, node in linears.items():
            if name in self.activations:
                spec = self.activations[name]
                _check(name, spec)
                key = (required_input(node, 0), spec)
                if key not in made:
                    made[key] = _insert(model, node, *key)
                node.replace_input_with(0, made[key])
                note.set_activation_bits(node, spec.bits)
        return ir.passes.PassResult(model, modified=bool(self.activations))


def _check(name: str, spec: ActivationQuantization) -> None:
    if spec.bits not in ACTIVATION_BITS or spec.bits == _FLOAT_BITS:
        raise ValueError(f"linear {name}: activations of {spec.bits} bits, expected 3, 4 or 8")
    if not 0 < spec.clip <= 1:
        raise ValueError(f"linear {name}: activation clip {spec.clip}, expected more than 0 and at most 1")


def _insert(model: ir.Model, linear: ir.Node, x: ir.Value, spec: ActivationQuantization) -> ir.Value:
    attributes = {"bits": spec.bits, "clip": spec.clip}
    node = bdq_node(model, "DynamicFakeQuantize", [x], attributes, f"{linear.name}/quantize_input")
    node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    model.graph.insert_before(linear, node)
    return node.outputs[0]
