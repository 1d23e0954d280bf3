"""Halve the bytes of scales in the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes.graph_edit import array_of, initializer, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level

_CODES, _SCALES = {"MatMulNBits": 1, "GatherBlockQuantized": 0}, 2


@dataclass(frozen=True)
class StoreScalesAsFp16Pass(GraphPass):
    """Store the scales of packed weights as float16, cast to float32 when the model is loaded.

        MatMulNBits(x, B, scales float32)  ->  MatMulNBits(x, Identity(B), Cast(scales float16, to=float32))

    ONNX Runtime folds the Cast and the Identity at load, at every optimisation level but ORT_DISABLE_ALL. There the
    Identity is what keeps the result right: without it the kernel prepacks B alone, without its scales, and the
    product is *silently zero* (measured, accuracy level 4); with it nothing is prepacked, so it is right but slow.

    Requires LOWERED, ensures LOWERED. A second run changes nothing.
    """

    name: ClassVar[str] = "store-scales-as-fp16"
    takes: ClassVar[Level] = Level.LOWERED
    gives: ClassVar[Level] = Level.LOWERED

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the scales.

        Raises:
            ValueError: scales that float16 does not represent exactly.
        """
        modified = False
        for node in list(model.graph):
            if node.op_type not in _CODES:
                continue
            reader, index = node, _SCALES
            producer = required_input(node, _SCALES).producer()
            if producer is not None and producer.op_type == "Reshape":
                reader, index = producer, 0
            scales = required_input(reader, index)
            if not scales.is_initializer() or scales.dtype != ir.DataType.FLOAT:
                continue
            _cast(model, scales)
            modified = True
        for node in list(model.graph) if modified else ():
            if node.op_type == "MatMulNBits" and required_input(node, 1).is_initializer():
                _hide_codes(model, node)
        return ir.passes.PassResult(model, modified=modified)


def _cast(model: ir.Model, scales: ir.Value) -> None:
    """Let every reader of `scales` read a Cast of its float16 copy."""
    exact = array_of(scales)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), exact):
        raise ValueError(f"scales {scales.name} are not exact in float16: round them before the codes are computed")
    stored = initializer(model, f"{scales.name}_fp16", half)
    node = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, name=f"{scales.name}/cast")
    node.outputs[0].name = f"{scales.name}/cast/output"
    node.outputs[0].type, node.outputs[0].shape = scales.type, scales.shape
    model.graph.insert_before(model.graph[0], node)
    scales.replace_all_uses_with(node.outputs[0])
    model.graph.initializers.pop(str(scales.name))


def _hide_codes(model: ir.Model, node: ir.Node) -> None:
    """Read the codes of a MatMulNBits through an Identity."""
    codes = required_input(node, 1)
    identity = ir.node("Identity", [codes], name=f"{node.name}/codes")
    output = identity.outputs[0]
    output.name, output.type, output.shape = f"{node.name}/codes/output", codes.type, codes.shape
    model.graph.insert_before(node, identity)
    node.replace_input_with(1, output)
