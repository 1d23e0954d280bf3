"""Small float graphs in the normal form of the builders, random quantized weights, and a session to run them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bdq_passes import AnnotateLinearsPass, InsertWeightQuantizationPass, MergeGateUpPass
from bdq_passes import annotations as note
from bdq_runtime.packing import PerChannel, QuantizedWeight, QuantSpec

Array = npt.NDArray[Any]
VOCABULARY, HIDDEN = 40, 48
EMBEDDING = "model.embed_tokens.weight"
COLUMNS = {"a": 24, "b": 16, "c": HIDDEN}
INPUTS = {"a": HIDDEN, "b": HIDDEN, "c": 40}


def _value(name: str, data_type: ir.DataType, shape: list[Any]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(data_type), shape=ir.Shape(shape))


def _constant(name: str, array: Array) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def _node(
    op_type: str, inputs: list[ir.Value], name: str, shape: list[Any] | None = None, **attributes: Any
) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=name)
    node.outputs[0].name = f"{name}_out"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = None if shape is None else ir.Shape(shape)
    return node


@dataclass(frozen=True)
class Tiny:
    """A float graph, and the float weights `[N, K]` by canonical name; `biases` by node name."""

    model: ir.Model
    weights: dict[str, Array]
    biases: dict[str, Array]

    def reference(self, ids: Array, weights: Mapping[str, Array]) -> Array:
        """Logits in float64 with `weights` in the place of the float ones."""
        used = {**self.weights, **weights}
        if "lm_head.weight" not in used:
            used["lm_head.weight"] = used[EMBEDDING]
        wide = {name: array.astype(np.float64) for name, array in used.items()}
        hidden = wide[EMBEDDING][ids]
        packed = np.concatenate([hidden @ wide["a.weight"].T, hidden @ wide["b.weight"].T], axis=-1)
        packed = np.maximum(packed + self.biases.get("ab", 0), 0)
        return np.maximum(packed @ wide["c.weight"].T, 0) @ wide["lm_head.weight"].T


@pytest.fixture
def tiny() -> Callable[..., Tiny]:
    """ids -> embedding -> packed linear ab (+ bias) -> Relu -> linear c -> Relu -> lm_head -> logits."""

    def make(*, tied: bool = True, bias: bool = False, seed: int = 0, vocabulary: int = VOCABULARY) -> Tiny:
        random = np.random.default_rng(seed)
        shapes = {f"{name}.weight": (COLUMNS[name], INPUTS[name]) for name in COLUMNS}
        shapes[EMBEDDING] = (vocabulary, HIDDEN)
        if not tied:
            shapes["lm_head.weight"] = (vocabulary, HIDDEN)
        weights = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        biases = {"ab": random.standard_normal(40).astype(np.float32)} if bias else {}
        table = _constant(EMBEDDING, weights[EMBEDDING])
        packed = _constant("ab.weight", np.concatenate([weights["a.weight"], weights["b.weight"]]).T)
        inner = _constant("c.weight", weights["c.weight"].T)
        head = _constant("lm_head.weight", weights.get("lm_head.weight", weights[EMBEDDING]).T)
        ids = _value("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        nodes = [_node("Gather", [table, ids], "model.embed_tokens", ["batch", "sequence", HIDDEN])]
        nodes.append(_node("MatMul", [nodes[-1].outputs[0], packed], "ab"))
        initializers = [table, packed, inner, head]
        if bias:
            initializers.append(_constant("ab.bias", biases["ab"]))
            nodes.append(_node("Add", [nodes[-1].outputs[0], initializers[-1]], "ab_bias"))
        nodes.append(_node("Relu", [nodes[-1].outputs[0]], "relu"))
        nodes.append(_node("MatMul", [nodes[-1].outputs[0], inner], "c"))
        nodes.append(_node("Relu", [nodes[-1].outputs[0]], "relu_c", ["batch", "sequence", HIDDEN]))
        nodes.append(_node("MatMul", [nodes[-1].outputs[0], head], "lm_head", ["batch", "sequence", vocabulary]))
        for node in nodes:
            if node.op_type == "MatMul":
                note.set_parts(node, ("a", "b") if node.name == "ab" else (str(node.name),))
        if tied:
            note.set_tied(nodes[-1], EMBEDDING)
        logits = nodes[-1].outputs[0]
        logits.name = "logits"
        graph = ir.Graph([ids], [logits], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="tiny")
        graph.opset_imports["com.microsoft"] = 1
        return Tiny(ir.Model(graph, ir_version=10), weights, biases)

    return make


@pytest.fixture
def random_weight() -> Callable[..., QuantizedWeight]:
    """A random quantized weight `[rows, columns]`, with scales that float16 represents."""

    def make(rows: int, columns: int, spec: QuantSpec, seed: int = 0) -> QuantizedWeight:
        random = np.random.default_rng(seed)
        blocks = -(-columns // spec.block_size(columns))
        top = 1 << spec.bits
        scales = ((random.random((rows, blocks)) + 0.5) / top).astype(np.float16).astype(np.float32)
        zeros = None if spec.symmetric else random.integers(0, top, (rows, blocks)).astype(np.uint8)
        return QuantizedWeight(random.integers(0, top, (rows, columns)).astype(np.uint8), scales, zeros, spec)

    return make


@pytest.fixture
def quantize_all(random_weight: Callable[..., QuantizedWeight]) -> Callable[..., dict[str, QuantizedWeight]]:
    """Random quantized weights for every float weight of a tiny graph, all of one spec but the given ones."""

    def make(tiny: Tiny, spec: QuantSpec, **others: QuantSpec | None) -> dict[str, QuantizedWeight]:
        specs = {name: others.get(name.split(".")[0], spec) for name in tiny.weights}
        return {
            name: random_weight(*tiny.weights[name].shape, chosen, seed)
            for seed, (name, chosen) in enumerate(specs.items())
            if chosen is not None
        }

    return make


@pytest.fixture
def run() -> Callable[..., Any]:
    """Run a graph in ONNX Runtime: with its own optimiser off, so that it cannot hide a wrong graph, or fully on."""

    def execute(model: ir.Model, feeds: dict[str, Array], *, optimize: bool = False, level: int = 0) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        # What ONNX Runtime's own fusion of DequantizeLinear + MatMul is to compute in: 4 would be int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        data = ir.to_proto(model).SerializeToString()
        outputs = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, feeds)
        return outputs[0] if len(outputs) == 1 else outputs

    return execute


@pytest.fixture
def relative_error() -> Callable[[Array, Array], float]:
    """Largest absolute difference over the largest absolute reference."""
    return lambda found, expected: float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture
def ids() -> Array:
    """Token ids `[2, 5]`."""
    return np.array([[0, 3, 7, 39, 12], [5, 5, 38, 1, 20]])


@pytest.fixture
def channel_int8() -> QuantSpec:
    """What static activations ask of weights."""
    return QuantSpec(8, PerChannel(), symmetric=True)


def _projection(nodes: list[ir.Node], constants: list[ir.Value], x: ir.Value, name: str, shape: tuple[int, int],
                seed: int, bias: bool) -> ir.Value:  # fmt: skip
    """The output of a linear `[K, N]` called `name`, with a bias where asked for."""
    random = np.random.default_rng(seed)
    constants.append(_constant(f"{name}.weight", (random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)))
    nodes.append(_node("MatMul", [x, constants[-1]], name))
    note.set_parts(nodes[-1], (name,))
    if bias:
        constants.append(_constant(f"{name}.bias", random.standard_normal(shape[1]).astype(np.float32)))
        nodes.append(_node("Add", [nodes[-1].outputs[0], constants[-1]], f"{name}.add_bias"))
    return nodes[-1].outputs[0]


@pytest.fixture
def mlp() -> Callable[..., ir.Model]:
    """x [batch, sequence, 48] -> gate and up (+ bias), 40 each -> act(gate) * up -> down -> y."""

    def make(activation: str, *, bias: bool = False, up_first: bool = False, swapped: bool = False) -> ir.Model:
        x = _value("x", ir.DataType.FLOAT, ["batch", "sequence", HIDDEN])
        nodes: list[ir.Node] = []
        constants: list[ir.Value] = []
        names = ("up", "gate") if up_first else ("gate", "up")
        found = {name: _projection(nodes, constants, x, f"mlp.{name}", (HIDDEN, 40), len(name), bias) for name in names}
        gate, up = (found["up"], found["gate"]) if swapped else (found["gate"], found["up"])
        if activation == "silu":
            nodes.append(_node("Sigmoid", [gate], "mlp.sigmoid"))
            nodes.append(_node("Mul", [gate, nodes[-1].outputs[0]], "mlp.act"))
        else:
            nodes.append(_node("Gelu", [gate], "mlp.act", approximate="tanh"))
        nodes.append(_node("Mul", [nodes[-1].outputs[0], up], "mlp.product"))
        y = _projection(nodes, constants, nodes[-1].outputs[0], "mlp.down", (40, HIDDEN), 7, bias=False)
        y.name, y.shape = "y", ir.Shape(["batch", "sequence", HIDDEN])
        opsets = {"": 23, "com.microsoft": 1}
        graph = ir.Graph([x], [y], nodes=nodes, initializers=constants, opset_imports=opsets, name="mlp")
        return ir.Model(graph, ir_version=10)

    return make


@pytest.fixture
def hidden() -> Array:
    """Hidden states `[2, 3, 48]`."""
    return np.random.default_rng(3).standard_normal((2, 3, HIDDEN)).astype(np.float32)


@dataclass(frozen=True)
class Quantized:
    """A graph at level QUANTIZED, the quantized weights by canonical name, biases by node name."""

    model: ir.Model
    weights: dict[str, QuantizedWeight]
    biases: dict[str, Array]


@pytest.fixture
def quantized(tiny: Callable[..., Tiny], quantize_all: Callable[..., dict[str, QuantizedWeight]]) -> Callable[..., Any]:
    """`tiny` with random quantized weights of one spec, or with float ones that were decided to stay."""

    def make(spec: QuantSpec | None = None, *, kept: bool = False, tied: bool = True, bias: bool = False) -> Quantized:
        graph = tiny(tied=tied, bias=bias)
        weights = {} if kept or spec is None else quantize_all(graph, spec)
        AnnotateLinearsPass(expected=3)(graph.model)
        InsertWeightQuantizationPass(weights, expected=3 if weights else 0)(graph.model)
        return Quantized(graph.model, weights, graph.biases)

    return make


@pytest.fixture
def mlp_quantized(mlp: Callable[..., ir.Model], random_weight: Callable[..., QuantizedWeight]) -> Callable[..., Any]:
    """`mlp` with random quantized weights, gate and up merged or not; float weights stay with `kept`."""

    def make(
        activation: str = "silu",
        *,
        merged: bool = True,
        kept: bool = False,
        bias: bool = False,
        spec: QuantSpec = QuantSpec(4, PerChannel()),  # noqa: B008  frozen
    ) -> ir.Model:
        model = mlp(activation, bias=bias)
        shapes = {str(node.name): node.inputs[1].shape for node in model.graph if node.op_type == "MatMul"}
        weights = {
            f"{name}.weight": random_weight(shape[1], shape[0], spec, seed)
            for seed, (name, shape) in enumerate(shapes.items())
        }
        AnnotateLinearsPass(expected=3)(model)
        if merged:
            MergeGateUpPass({name: weight.spec for name, weight in weights.items()}, expected=1)(model)
        count = 0 if kept else 2 if merged else 3
        InsertWeightQuantizationPass({} if kept else weights, expected=count)(model)
        return model

    return make
