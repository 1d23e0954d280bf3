"""Names of nodes and values, the interface of the graph, and nothing of the machine it was made on."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from bdq_export.builders.graph import has_final_name, initializer, replace_value, scope_of
from bdq_models import Dimensions
from bdq_passes import annotations as note


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers, one for each distinct content."""
    known: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "Constant":
            continue
        tensor = ir.convenience.get_const_tensor(node.outputs[0])
        assert tensor is not None, "a Constant has a value"
        key = (tensor.dtype.name, tuple(tensor.shape.numpy()), tensor.tobytes())
        if key not in known:
            known[key] = initializer(model, ir.Tensor(tensor.numpy(), name=f"constants.{len(known)}"))
        replace_value(node.outputs[0], known[key])
        model.graph.remove(node, safe=True)


def name_everything(model: ir.Model) -> None:
    """Name nodes `<module path>.<op>` unless a step named them, values after their node; drop foreign metadata.

    The value of a node's first output is called as the node, further ones `<node>.output_<index>`, or nothing
    where nobody reads them; graph inputs, graph outputs and initializers keep their names.
    """
    counts: Counter[str] = Counter()
    taken = {value.name for value in (*model.graph.inputs, *model.graph.outputs)} | set(model.graph.initializers)
    for node in model.graph:
        name = _node_name(node)
        counts[name] += 1
        node.name = name if counts[name] == 1 else f"{name}.{counts[name] - 1}"
        for index, value in enumerate(node.outputs):
            if index > 0 and not value.uses() and not value.is_graph_output():
                value.name = ""  # left out: a norm would compute its mean and variance for nobody
            elif not value.is_graph_output():
                value.name = node.name if index == 0 else f"{node.name}.output_{index}"
                assert value.name not in taken, f"two values are called {value.name}"
                value.type, value.shape = None, None
            _clear(value)
        _clear(node)
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        _clear(value)
    for owner in (model, model.graph):
        _clear(owner)
        owner.doc_string = None
    model.graph.name = "main"
    model.producer_name, model.producer_version = "bdq_export", None


def _node_name(node: ir.Node) -> str:
    if has_final_name(node):
        return str(node.name)
    scope = scope_of(node)
    return f"{scope}.{node.op_type.lower()}" if scope else node.op_type.lower()


def _clear(owner: ir.Model | ir.Graph | ir.Node | ir.Value) -> None:
    for key in [key for key in owner.metadata_props if not key.startswith(note.PREFIX)]:
        del owner.metadata_props[key]


def declare_interface(model: ir.Model, dimensions: Dimensions) -> None:
    """Order, types and symbolic shapes of the graph's inputs and outputs.

    Dimensions: `batch`, `sequence` (new tokens), `past` (cached tokens), `total` (past + sequence).
    """
    cache = (dimensions.kv_heads, dimensions.head_dim)
    shapes: dict[str, tuple[ir.DataType, list[int | str]]] = {
        "input_ids": (ir.DataType.INT64, ["batch", "sequence"]),
        "attention_mask": (ir.DataType.INT64, ["batch", "total"]),
        "logits": (ir.DataType.FLOAT, ["batch", "sequence", dimensions.vocab_size]),
    }
    for layer in range(dimensions.layers):
        for leaf in ("key", "value"):
            past, present = f"past_key_values.{layer}.{leaf}", f"present.{layer}.{leaf}"
            shapes[past] = (ir.DataType.FLOAT, ["batch", cache[0], "past", cache[1]])
            shapes[present] = (ir.DataType.FLOAT, ["batch", cache[0], "total", cache[1]])
    for values in (model.graph.inputs, model.graph.outputs):
        order = list(shapes)
        # A tracer's own inputs have no readers left: the frame computes them from the mask.
        named = [value for value in values if value.name in shapes]
        ordered = sorted(named, key=lambda value: order.index(str(value.name)))
        values[:] = ordered
        for value in ordered:
            dtype, shape = shapes[str(value.name)]
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
