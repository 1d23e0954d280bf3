"""Compute the gate and the up projection of a gated MLP by one linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.gated_mlp import GatedMlp, bias_of, gated_mlps, halves_of, linear_of
from bdq_passes.graph_edit import array_of, initializer, remove_unused, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import Level, weight_value
from bdq_runtime.packing import QuantSpec

MERGED = "gate_up_proj"


@dataclass(frozen=True)
class MergeGateUpPass(GraphPass):
    """Merge the two linears of each gated MLP whose weights are quantized alike.

        act(MatMul(x, Wg) [+ bg]) * (MatMul(x, Wu) [+ bu])
        ->
        g, u = Split(MatMul(x, [Wg Wu]) {bdq.parts: gate,up} [+ [bg bu]])
        act(g) * u

    which is the form that Phi-3's packed weight has from the start. The merged linear is called
    `<MLP>.gate_up_proj`. Its float weight is concatenated only if somebody reads it, which quantization does not.
    The number of linears that the graph carries is corrected.

    Requires ANNOTATED, ensures ANNOTATED. A second run changes nothing.

    Attributes:
        specs: by canonical name, `<logical path>.weight`; float where absent. A gate and an up that differ, or that
            stay float, are left as they are.
        expected: gated MLPs that must end up with one linear, those that had one included; another number is an error.
    """

    name: ClassVar[str] = "merge-gate-up"
    takes: ClassVar[Level] = Level.ANNOTATED
    gives: ClassVar[Level] = Level.ANNOTATED

    specs: Mapping[str, QuantSpec]
    expected: int

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the pairs.

        Raises:
            ValueError: another number of MLPs than `expected`.
        """
        merged = before = 0
        for mlp in gated_mlps(model):
            if halves_of(mlp.gate) is not None:
                before += self._is_quantized(mlp)
            elif self._can_merge(mlp):
                _merge(model, mlp)
                merged += 1
        if merged + before != self.expected:
            raise ValueError(f"{merged + before} gated MLPs have one linear for gate and up, expected {self.expected}")
        if merged:
            note.set_linear_count(model, len(list(note.with_role(model, note.LINEAR))))
        return ir.passes.PassResult(model, modified=merged > 0)

    def _is_quantized(self, mlp: GatedMlp) -> bool:
        half = halves_of(mlp.gate)
        linear = None if half is None else linear_of(required_input(half[0], 0))
        return linear is not None and self._alike(note.parts(linear[0]))

    def _can_merge(self, mlp: GatedMlp) -> bool:
        gate, up = linear_of(mlp.gate), linear_of(mlp.up)
        if gate is None or up is None or gate[0] is up[0]:
            return False
        same_input = gate[0].inputs[0] is up[0].inputs[0]
        same_bias = (gate[1] is None) == (up[1] is None)
        return same_input and same_bias and self._alike((*note.parts(gate[0]), *note.parts(up[0])))

    def _alike(self, parts: tuple[str, ...]) -> bool:
        specs = {self.specs.get(f"{part}.weight") for part in parts}
        return len(specs) == 1 and None not in specs


def _merge(model: ir.Model, mlp: GatedMlp) -> None:
    found = [linear_of(mlp.gate), linear_of(mlp.up)]
    pairs = [pair for pair in found if pair is not None]
    linears = [linear for linear, _ in pairs]
    adds = [add for _, add in pairs if add is not None]
    parts = tuple(part for linear in linears for part in note.parts(linear))
    path = f"{parts[0].rpartition('.')[0]}.{MERGED}".lstrip(".")
    weights = [weight_value(linear) for linear in linears]
    weight = _concatenated(model, f"{path}.weight", weights)
    merged = ir.node("MatMul", [required_input(linears[0], 0), weight], name=path)
    note.set_parts(merged, parts)
    note.set_role(merged, note.LINEAR)
    nodes = [merged]
    biases: list[ir.Value] = []
    if adds:
        biases = [bias_of(add) for add in adds]
        bias = initializer(model, f"{path}.bias", np.concatenate([array_of(value) for value in biases]))
        nodes.append(ir.node("Add", [merged.outputs[0], bias], name=f"{path}.add_bias"))
    split = ir.node(
        "Split", [nodes[-1].outputs[0]], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{path}/split"
    )
    nodes.append(split)
    for node in nodes[:-1]:
        node.outputs[0].name, node.outputs[0].type = f"{node.name}/output", linears[0].outputs[0].type
    model.graph.insert_before(next(node for node in model.graph if node in linears), nodes)
    for old, new in zip((mlp.gate, mlp.up), split.outputs, strict=True):
        old.replace_all_uses_with(new)
        new.name, new.type, new.shape = f"{old.name}/half", old.type, old.shape
    for node in (*adds, *linears):
        model.graph.remove(node, safe=True)
    remove_unused(model, [*weights, *biases])


def _concatenated(model: ir.Model, name: str, values: list[ir.Value]) -> ir.Value:
    """An initializer `[K, N1 + N2]` whose contents are made when they are read."""
    tensors = [value.const_value for value in values if value.const_value is not None]

    def make() -> ir.TensorProtocol:
        return ir.Tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=1), name=name)

    shape = ir.Shape([tensors[0].shape.numpy()[0], sum(tensor.shape.numpy()[1] for tensor in tensors)])
    lazy = ir.LazyTensor(make, dtype=tensors[0].dtype, shape=shape, name=name)
    value = ir.Value(name=name, shape=shape, type=ir.TensorType(tensors[0].dtype), const_value=lazy)
    model.graph.register_initializer(value)
    return value
