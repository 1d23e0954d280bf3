"""Let linears transform their inputs when the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.graph_edit import initializer, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level
from bdq_runtime.opset import MAX_HADAMARD
from bdq_runtime.specs import OnlineTransform


@dataclass(frozen=True)
class InsertOnlineTransformsPass(GraphPass):
    """Put a Hadamard transform, and a diagonal where there is one, in front of linears.

        MatMul(x, W)  ->  MatMul(bdq::Hadamard(x) * diagonal, W)

    The weights are those that expect transformed inputs. Linears of one input and one transform share the nodes.

    Requires QUANTIZED, ensures QUANTIZED.

    Attributes:
        transforms: by node name (the module path); each must be used.
    """

    name: ClassVar[str] = "insert-online-transforms"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    transforms: Mapping[str, OnlineTransform] = field(repr=False)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the nodes.

        Raises:
            ValueError: a transform without a linear, of a size that is no power of two or does not divide the input,
                or with a diagonal of another length.
        """
        linears = {str(node.name): node for node in note.with_role(model, note.LINEAR)}
        unknown = sorted(set(self.transforms) - set(linears))
        if unknown:
            raise ValueError(f"{len(unknown)} online transforms have no linear, the first is of {unknown[0]}")
        made: dict[tuple[ir.Value, int, bytes], ir.Value] = {}
        for name, node in linears.items():
            if name in self.transforms:
                transform = self.transforms[name]
                _check(node, transform)
                x = required_input(node, 0)
                key = (x, transform.hadamard_size, _bytes(transform))
                if key not in made:
                    made[key] = _insert(model, node, x, transform)
                node.replace_input_with(0, made[key])
        return ir.passes.PassResult(model, modified=bool(self.transforms))


def _check(node: ir.Node, transform: OnlineTransform) -> None:
    shape = required_input(node, 1).shape
    columns = None if shape is None else shape[0]
    size = transform.hadamard_size
    if not isinstance(columns, int) or not 1 <= size <= MAX_HADAMARD or size & (size - 1) or columns % size:
        raise ValueError(
            f"linear {node.name}: a Hadamard transform of size {size} for {columns} inputs, expected a power of two up "
            f"to {MAX_HADAMARD} that divides them"
        )
    if transform.diagonal is not None and transform.diagonal.shape != (columns,):
        raise ValueError(f"linear {node.name}: a diagonal {transform.diagonal.shape}, expected {(columns,)}")


def _bytes(transform: OnlineTransform) -> bytes:
    return b"" if transform.diagonal is None else np.asarray(transform.diagonal, np.float32).tobytes()


def _insert(model: ir.Model, linear: ir.Node, x: ir.Value, transform: OnlineTransform) -> ir.Value:
    nodes = [bdq_node(model, "Hadamard", [x], {"size": transform.hadamard_size}, f"{linear.name}/hadamard")]
    if transform.diagonal is not None:
        diagonal = np.ascontiguousarray(transform.diagonal, np.float32)
        value = initializer(model, f"{linear.name}/diagonal", diagonal)
        nodes.append(ir.node("Mul", [nodes[0].outputs[0], value], name=f"{linear.name}/scale_input"))
        nodes[-1].outputs[0].name = f"{linear.name}/scale_input/output"
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    model.graph.insert_before(linear, nodes)
    return nodes[-1].outputs[0]
