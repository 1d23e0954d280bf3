"""Remove what tracing leaves between the operators that compute.

Rules, in the order in which they are applied:

    Identity(x), Slice of everything           ->  x
    SequenceAt(SplitToSequence(x, n), i)       ->  output i of Split(x)                n a constant
    RMSNormalization(Transpose(x))             ->  Transpose(RMSNormalization(x))      last axis untouched
    Transpose(Transpose(x))                    ->  x                                   if they cancel
    Reshape(Reshape(x, s), t)                  ->  Reshape(x, t)
    Reshape(x, shape of x)                     ->  x
    Reshape(x, Concat(batch, sequence, ...))   ->  Reshape(x, constant with 0 for an axis that stays)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from bdq_export.builders.graph import constant, operand, producer_of, replace_value, scope_of, set_scope, static_ints

_ALL = 1 << 31


def simplify(model: ir.Model) -> None:
    """Apply the rules to every node; nodes that nobody reads any more are left to `remove_dead`."""
    for node in list(model.graph):
        if node.op_type == "Identity" or _takes_everything(node):
            replace_value(node.outputs[0], operand(node, 0))
    for node in list(model.graph):
        if node.op_type == "SplitToSequence":
            _split_to_tensors(model, node)
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            _norm_before_transpose(model, node)
    for node in list(model.graph):
        if node.op_type == "Transpose":
            _cancel_transposes(node)
    for node in list(model.graph):
        if node.op_type == "Reshape":
            _shorten_reshape(model, node)


def _takes_everything(node: ir.Node) -> bool:
    """Whether a Slice starts at 0, ends beyond any size and has step 1."""
    if node.op_type != "Slice":
        return False
    starts, ends = static_ints(operand(node, 1)), static_ints(operand(node, 2))
    steps = static_ints(node.inputs[4]) if len(node.inputs) > 4 else (1,)
    if starts is None or ends is None or steps is None:
        return False
    return not any(starts) and all(end >= _ALL for end in ends) and set(steps) == {1}


def _split_to_tensors(model: ir.Model, node: ir.Node) -> None:
    readers = node.outputs[0].consumers()
    indices = [static_ints(reader.inputs[1]) if reader.op_type == "SequenceAt" else None for reader in readers]
    known = [index[0] for index in indices if index is not None]
    if static_ints(node.inputs[1]) is None or sorted(known) != list(range(len(readers))):
        return
    attributes = {"axis": node.attributes.get_int("axis", 0), "num_outputs": len(readers)}
    split = ir.node("Split", [node.inputs[0]], attributes, num_outputs=len(readers))
    set_scope(split, scope_of(node))
    model.graph.insert_before(node, split)
    for reader, index in zip(readers, known, strict=True):
        split.outputs[index].shape, split.outputs[index].type = reader.outputs[0].shape, reader.outputs[0].type
        replace_value(reader.outputs[0], split.outputs[index])


def _norm_before_transpose(model: ir.Model, norm: ir.Node) -> None:
    transpose = producer_of(norm.inputs[0], "Transpose")
    if transpose is None or norm.attributes.get_int("axis", -1) != -1:
        return
    permutation = list(transpose.attributes.get_ints("perm", ()))
    if not permutation or permutation[-1] != len(permutation) - 1:
        return
    before, after = operand(transpose, 0), norm.outputs[0]
    moved = ir.node("Transpose", [after], {"perm": permutation}, metadata_props=dict(transpose.metadata_props))
    moved.meta.update(transpose.meta)
    replace_value(after, moved.outputs[0])
    moved.replace_input_with(0, after)
    moved.outputs[0].shape, after.shape = after.shape, before.shape
    norm.replace_input_with(0, before)
    model.graph.insert_after(norm, moved)


def _cancel_transposes(node: ir.Node) -> None:
    first = producer_of(node.inputs[0], "Transpose")
    if first is None:
        return
    inner, outer = first.attributes.get_ints("perm", ()), node.attributes.get_ints("perm", ())
    if [inner[axis] for axis in outer] == list(range(len(inner))):
        replace_value(node.outputs[0], operand(first, 0))


def _shorten_reshape(model: ir.Model, node: ir.Node) -> None:
    inner = producer_of(node.inputs[0], "Reshape")
    if inner is not None:
        node.replace_input_with(0, operand(inner, 0))
    source, target = operand(node, 0).shape, node.outputs[0].shape
    if source is None or target is None:
        return
    if source == target:
        replace_value(node.outputs[0], operand(node, 0))
        return
    shape = [_reshape_entry(axis, source, target) for axis in range(len(target))]
    if shape.count(-1) > 1:
        return
    name = "shape." + "_".join(str(entry).replace("-1", "rest") for entry in shape)
    node.replace_input_with(1, constant(model, name, np.array(shape, np.int64)))
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _reshape_entry(axis: int, source: ir.Shape, target: ir.Shape) -> int:
    """A number; 0 for an axis that keeps its unknown size, -1 for another unknown size."""
    size = target[axis]
    if isinstance(size, int):
        return size
    return 0 if axis < len(source) and source[axis] == size else -1
