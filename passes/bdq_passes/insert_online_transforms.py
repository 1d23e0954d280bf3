"""Let linears transform their inputs when the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.bdq_nodes import bdq_node
from bdq_passes.graph_edit import initializer, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level
from bdq_runtime.opset import MAX_HADAMARD
from bdq_runtime.specs import Kronecker, OnlineTransform


@dataclass(frozen=True)
class InsertOnlineTransformsPass(GraphPass):
    """Put a Hadamard transform, and a diagonal where there is one, or a Kronecker product in front of linears.

        MatMul(x, W)  ->  MatMul(bdq::Hadamard(x) * diagonal, W)
        MatMul(x, W)  ->  MatMul(Reshape(MatMul(leftᵀ, MatMul(Reshape(x), right))), W)

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
                with a diagonal of another length, or Kronecker factors that do not make up the input.
        """
        linears = {str(node.name): node for node in note.with_role(model, note.LINEAR)}
        unknown = sorted(set(self.transforms) - set(linears))
        if unknown:
            raise ValueError(f"{len(unknown)} online transforms have no linear, the first is of {unknown[0]}")
        made: dict[tuple[ir.Value, int, int, tuple[bytes, ...]], ir.Value] = {}
        for name, node in linears.items():
            if name in self.transforms:
                transform = self.transforms[name]
                _check(node, transform)
                x = required_input(node, 0)
                key = (x, transform.hadamard_size, transform.interleave, _bytes(transform))
                if key not in made:
                    made[key] = _insert(model, node, x, transform)
                node.replace_input_with(0, made[key])
        return ir.passes.PassResult(model, modified=bool(self.transforms))


def _check(node: ir.Node, transform: OnlineTransform) -> None:
    columns, size = _columns(node), transform.hadamard_size
    if not 1 <= size <= MAX_HADAMARD or size & (size - 1) or columns % size:
        raise ValueError(
            f"linear {node.name}: a Hadamard transform of size {size} for {columns} inputs, expected a power of two up "
            f"to {MAX_HADAMARD} that divides them"
        )
    if transform.interleave < 1 or columns % transform.interleave:
        raise ValueError(f"linear {node.name}: {transform.interleave} runs of channels for {columns} inputs")
    if transform.diagonal is not None and transform.diagonal.shape != (columns,):
        raise ValueError(f"linear {node.name}: a diagonal {transform.diagonal.shape}, expected {(columns,)}")
    if transform.kronecker is not None:
        left, right = transform.kronecker.left, transform.kronecker.right
        rows = left.shape[0] * (columns // max(1, left.shape[0]) if right is None else right.shape[0])
        if rows != columns:
            shapes = (left.shape, None if right is None else right.shape)
            raise ValueError(f"linear {node.name}: Kronecker factors {shapes} for {columns} inputs")


def _columns(linear: ir.Node) -> int:
    shape = required_input(linear, 1).shape
    columns = None if shape is None else shape[0]
    if not isinstance(columns, int):
        raise ValueError(f"linear {linear.name}: its weight has no known shape")
    return columns


def _bytes(transform: OnlineTransform) -> tuple[bytes, ...]:
    kronecker = transform.kronecker
    arrays = (transform.diagonal, *(() if kronecker is None else (kronecker.left, kronecker.right)))
    return tuple(b"" if array is None else np.asarray(array, np.float32).tobytes() for array in arrays)


def _insert(model: ir.Model, linear: ir.Node, x: ir.Value, transform: OnlineTransform) -> ir.Value:
    if transform.kronecker is not None:
        return _insert_kronecker(model, linear, x, transform.kronecker)
    attributes = {"size": transform.hadamard_size, "interleave": transform.interleave}
    nodes = [bdq_node(model, "Hadamard", [x], attributes, f"{linear.name}/hadamard")]
    if transform.diagonal is not None:
        diagonal = np.ascontiguousarray(transform.diagonal, np.float32)
        value = initializer(model, f"{linear.name}/diagonal", diagonal)
        nodes.append(ir.node("Mul", [nodes[0].outputs[0], value], name=f"{linear.name}/scale_input"))
        nodes[-1].outputs[0].name = f"{linear.name}/scale_input/output"
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = x.type, x.shape
    model.graph.insert_before(linear, nodes)
    return nodes[-1].outputs[0]


def _insert_kronecker(model: ir.Model, linear: ir.Node, x: ir.Value, kronecker: Kronecker) -> ir.Value:
    """Each token's channels as a matrix `[n1, n2]`, times `right`, and `leftᵀ` times that."""
    first = len(kronecker.left)
    second = _columns(linear) // first
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], what: str) -> ir.Value:
        node = ir.node(op_type, inputs, name=f"{linear.name}/{what}")
        nodes.append(node)
        value = node.outputs[0]
        value.name, value.type = f"{node.name}/output", x.type
        if op_type == "MatMul":
            note.set_role(node, note.ONLINE)
        return value

    def constant(what: str, array: npt.NDArray[Any]) -> ir.Value:
        return initializer(model, f"{linear.name}/{what}", np.ascontiguousarray(array))

    value = add("Reshape", [x, constant("kronecker_shape", np.array([-1, first, second], np.int64))], "split_channels")
    if kronecker.right is not None:
        value = add(
            "MatMul", [value, constant("kronecker_right", kronecker.right.astype(np.float32))], "multiply_right"
        )
    value = add("MatMul", [constant("kronecker_left", kronecker.left.T.astype(np.float32)), value], "multiply_left")
    shape = add("Shape", [x], "channels_shape")
    shape.type = ir.TensorType(ir.DataType.INT64)
    value = add("Reshape", [value, shape], "join_channels")
    value.shape = x.shape
    model.graph.insert_before(linear, nodes)
    return value
