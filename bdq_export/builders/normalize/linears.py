"""Linears: `MatMul(x, Transpose(Concat(Wq, Wk, ...)))` becomes a named MatMul on one `[K, N]` initializer.

    MatMul(x, Transpose(W))                       -> MatMul(x, <path>.weight)
    MatMul(x, Transpose(Concat(Wq, Wk, Wv)))      -> MatMul(x, <layer>.self_attn.qkv_proj.weight)
    Add(y, b), Add(y, Concat(bq, bk, bv))         -> Add(y, <path>.bias)

W are parameters `[N, K]` called after their module; no value is needed, only names are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from bdq_export.builders.graph import initializer, operand, producer_of, set_name, static_ints
from bdq_export.builders.weights import WeightSource
from bdq_models import Architecture
from bdq_passes import annotations as note

QKV = "qkv_proj"
_ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj")


def fold_linears(model: ir.Model, source: WeightSource) -> None:
    """Rewrite every MatMul on parameters; other MatMuls stay as they are."""
    for node in list(model.graph):
        if node.op_type != "MatMul":
            continue
        modules = parameter_modules(node.inputs[1], "weight")
        if modules:
            _fold(model, node, modules, source)


def parameter_modules(value: ir.Value | None, leaf: str) -> tuple[str, ...]:
    """The modules whose parameters `leaf` make up `value`, through Transpose and Concat; empty for other values."""
    if value is None:
        return ()
    if value.is_initializer():
        path, _, last = str(value.name).rpartition(".")
        return (path,) if last == leaf and path else ()
    node = value.producer()
    if node is None or node.op_type not in ("Transpose", "Concat", "Identity"):
        return ()
    modules = [parameter_modules(part, leaf) for part in node.inputs]
    return tuple(path for paths in modules for path in paths) if all(modules) else ()


def logical_parts(architecture: Architecture, module: str) -> tuple[str, ...]:
    """The logical linears that the checkpoint keeps in `module`: itself, unless it is packed."""
    for packed, parts in architecture.packed:
        if module.endswith(f".{packed}"):
            prefix = module.removesuffix(packed)
            return tuple(prefix + part for part in parts)
    return (module,)


def packed_name(parts: tuple[str, ...]) -> str:
    """The module path of a linear made of `parts` of one attention block: `<attention>.qkv_proj`.

    Raises:
        ValueError: parts that do not belong to one attention block in the order q, k, v.
    """
    parents = {part.rpartition(".")[0] for part in parts}
    if len(parents) != 1 or tuple(part.rpartition(".")[2] for part in parts) != _ATTENTION_PARTS:
        raise ValueError(f"linears {parts} are concatenated, expected the q, k and v projections of one layer")
    return f"{parents.pop()}.{QKV}"


def _fold(model: ir.Model, node: ir.Node, modules: tuple[str, ...], source: WeightSource) -> None:
    architecture = source.architecture
    embedding, head = architecture.embedding, architecture.lm_head
    path = modules[0] if len(modules) == 1 else packed_name(modules)
    parts = tuple(part for module in modules for part in logical_parts(architecture, module))
    if path in (embedding, head):
        path, parts, weight = head, (head,), source.head_matrix()
        if source.tied:
            note.set_tied(node, f"{embedding}.weight")
    else:
        weight = source.matrix(path, parts)
    name_linear(model, node, path, parts, weight)
    for user in node.outputs[0].consumers():
        _fold_bias(model, user, node, path, parts, source)


def name_linear(model: ir.Model, node: ir.Node, path: str, parts: tuple[str, ...], weight: ir.TensorProtocol) -> None:
    """Give a MatMul its module path, its logical parts and its weight."""
    # The parameter of the same name and the other layout may be there still.
    model.graph.initializers.pop(str(weight.name), None)
    node.replace_input_with(1, initializer(model, weight))
    set_name(node, path)
    note.set_parts(node, parts)


def _fold_bias(
    model: ir.Model, user: ir.Node, node: ir.Node, path: str, parts: tuple[str, ...], source: WeightSource
) -> None:
    if user.op_type != "Add":
        return
    index = 1 if user.inputs[0] is node.outputs[0] else 0
    if not parameter_modules(user.inputs[index], "bias"):
        return
    bias = source.bias(path, parts)
    model.graph.initializers.pop(str(bias.name), None)
    value = initializer(model, bias)
    user.replace_input_with(0, node.outputs[0])
    user.replace_input_with(1, value)
    set_name(user, f"{path}.add_bias")


def pack_attention_inputs(model: ir.Model, source: WeightSource) -> None:
    """Compute q, k and v by one MatMul where GroupQueryAttention reads them as they come out of their linears.

        GroupQueryAttention(xWq + bq, xWk + bk, xWv + bv, ...) -> GroupQueryAttention(xW + b, , , ...)
        GroupQueryAttention(y[:q], y[q:k], y[k:], ...)         -> GroupQueryAttention(y, , , ...)

    Where a norm stands between (Qwen 3, Gemma 3) the three linears stay: splitting the result costs what packing saves.
    """
    for node in list(model.graph):
        if node.op_type == "GroupQueryAttention" and node.inputs[1] is not None:
            whole = _sliced_value(node.inputs[:3])
            if whole is not None:
                _read_packed(node, whole)
                continue
            linears = [_linear_of(value) for value in node.inputs[:3]]
            biased = [is_bias_add(value) for value in node.inputs[:3]]
            if all(linears) and len(set(biased)) == 1:
                _pack(model, node, [linear for linear in linears if linear is not None], biased[0], source)


def is_bias_add(value: ir.Value | None) -> bool:
    """Whether `value` is the sum of a linear and its bias."""
    add = producer_of(value, "Add")
    return add is not None and str(add.name).endswith(".add_bias")


def _linear_of(value: ir.Value | None) -> ir.Node | None:
    if is_bias_add(value) and value is not None:
        add = value.producer()
        value = None if add is None else add.inputs[0]
    node = producer_of(value, "MatMul")
    return node if node is not None and len(note.parts(node)) == 1 else None


def _pack(model: ir.Model, node: ir.Node, linears: list[ir.Node], biased: bool, source: WeightSource) -> None:
    if len({operand(linear, 0) for linear in linears}) != 1:
        return
    parts = tuple(str(linear.name) for linear in linears)
    path = packed_name(parts)
    packed = ir.node("MatMul", [linears[0].inputs[0], None], name=path)
    model.graph.insert_before(linears[0], packed)
    name_linear(model, packed, path, parts, source.matrix(path, parts))
    result = packed.outputs[0]
    if biased:
        bias = initializer(model, source.bias(path, parts))
        add = ir.node("Add", [result, bias])
        set_name(add, f"{path}.add_bias")
        model.graph.insert_after(packed, add)
        result = add.outputs[0]
    _read_packed(node, result)


def _read_packed(attention: ir.Node, value: ir.Value) -> None:
    for index, replacement in enumerate((value, None, None)):
        attention.replace_input_with(index, replacement)


def _sliced_value(values: Sequence[ir.Value | None]) -> ir.Value | None:
    """The value that `values` are consecutive slices of, along the last of three axes; None if they are not."""
    slices = [producer_of(value, "Slice") for value in values]
    bounds = [None if node is None else [static_ints(value) for value in node.inputs[1:3]] for node in slices]
    first = slices[0]
    if first is None or len({None if node is None else node.inputs[0] for node in slices}) != 1:
        return None
    end: tuple[int, ...] | None = (0,)
    for node, bound in zip(slices, bounds, strict=True):
        if node is None or bound is None or bound[0] != end or static_ints(node.inputs[3]) not in ((2,), (-1,)):
            return None
        end = bound[1]
    return first.inputs[0]
