"""Models of one `bdq` node with its function body, and inputs for them.

The same model is for stock ONNX Runtime (body), for a session with the library (kernel) and for onnx's evaluator (body,
or NumPy reference).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from bdq_passes.functions import attach_functions
from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION
from bdq_runtime.panels import interleave_panels, pack_panels, pack_scales
from bdq_runtime.reference.onnx_operators import evaluate

Array = np.ndarray[Any, Any]
CONSTANTS = ("weight", "scales", "bias", "diagonal", "cos_cache", "sin_cache")
"""Inputs that are initializers, as in a real model."""


@dataclass(frozen=True, eq=False)
class Case:
    """One node: its operator, attributes (those of the table's defaults may be left out) and inputs by name."""

    operator: str
    attributes: Mapping[str, Any]
    inputs: Mapping[str, Array]

    @property
    def feeds(self) -> dict[str, Array]:
        """The inputs that are not initializers."""
        return {name: array for name, array in self.inputs.items() if name not in CONSTANTS}

    def reference(self) -> list[Array]:
        """The outputs that the NumPy reference gives."""
        operator = OPERATORS[self.operator]
        return list(evaluate(operator, [self.inputs[name] for name in operator.inputs], dict(self.attributes)))


def model_of(*cases: Case, functions: bool = True) -> onnx.ModelProto:
    """A model with one node for each case, which read nothing of each other; names end with the number of the case
    when there are several. Dimensions of inputs are symbolic.
    """
    graph_inputs, initializers, nodes, outputs = [], [], [], []
    for number, case in enumerate(cases):
        end = f"_{number}" if len(cases) > 1 else ""
        operator = OPERATORS[case.operator]
        values = []
        for name in operator.inputs:
            array = case.inputs[name]
            value = ir.Value(name=name + end, type=ir.TensorType(ir.DataType.from_numpy(array.dtype)))
            if name in CONSTANTS:
                value.const_value, value.shape = ir.tensor(array, name=name + end), ir.Shape(array.shape)
                initializers.append(value)
            else:
                value.shape = ir.Shape([f"{name}{end}_{axis}" for axis in range(array.ndim)])
                graph_inputs.append(value)
            values.append(value)
        results = [
            ir.Value(
                name=name + end,
                type=ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))),
                shape=ir.Shape(
                    [f"{name}{end}_{axis}" for axis in range(4 if "present" in name else values[0].shape.rank())]
                ),
            )
            for name, kind in operator.outputs.items()
        ]
        nodes.append(ir.node(case.operator, values, dict(case.attributes), domain=DOMAIN, outputs=results))
        outputs += results
    opsets = {"": 23, DOMAIN: VERSION}
    graph = ir.Graph(graph_inputs, outputs, nodes=nodes, initializers=initializers, opset_imports=opsets, name="case")
    model = ir.Model(graph, ir_version=11)
    if functions:
        attach_functions(model)
    return ir.to_proto(model)


def run_in_onnxruntime(
    model: onnx.ModelProto, feeds: Mapping[str, Array], options: onnxruntime.SessionOptions | None = None
) -> list[Array]:
    """Outputs on the CPU; `options` may register the library."""
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, dict(feeds))
    return found


def linear_case(operator: str, x: Array, n: int, seed: int = 0, **attributes: Any) -> Case:
    """A linear operator with random weights and scales; `x [..., K]`."""
    rng, k = np.random.default_rng(seed), x.shape[-1]
    bits, block = attributes["weight_bits"], attributes.get("block_size", 0)
    blocks, gated = -(-k // block) if block else 1, "Gated" in operator
    codes = [rng.integers(0, 1 << bits, (n, k), dtype=np.uint8) for _ in range(2)]
    scales = [(rng.random((n, blocks)) * 0.1 + 0.01).astype(np.float16) for _ in range(2)]
    packed, steps = [pack_panels(part, bits) for part in codes], [pack_scales(part) for part in scales]
    inputs: dict[str, Array] = {
        "x": x,
        "diagonal": (rng.random(k) + 0.5).astype(np.float32),
        "weight": interleave_panels(*packed) if gated else packed[0],
        "scales": interleave_panels(*steps) if gated else steps[0],
        "bias": rng.standard_normal(2 * n if gated else n).astype(np.float32),
    }
    wanted = {name: inputs[name] for name in OPERATORS[operator].inputs}
    return Case(operator, {"K": k, "N": n, **attributes}, wanted)


def attention_case(
    operator: str, lengths: list[int], tokens: int, total: int, past_positions: int, seed: int = 0, **attributes: Any
) -> Case:
    """An attention operator with random inputs; row b of the batch has `lengths[b]` tokens, `tokens` of them new.

    Bytes of the past are random too: rows that hold tokens are read, the others must not matter.
    """
    rng, size = np.random.default_rng(seed), attributes["head_size"]
    heads, kv_heads = attributes["num_heads"], attributes["kv_num_heads"]
    query, key, value = (
        rng.standard_normal((len(lengths), tokens, count * size)).astype(np.float32) * 2
        for count in (heads, kv_heads, kv_heads)
    )
    half = attributes.pop("rotary_dim", size) // 2
    angles = np.arange(total + 3)[:, None] * 10000.0 ** -(np.arange(half) / half)
    inputs: dict[str, Array] = {
        "query": query,
        "key": key,
        "value": value,
        "qkv": np.concatenate([query, key, value], axis=-1),
        "seqlens_k": np.array(lengths, np.int32) - 1,
        "total_sequence_length": np.array(total, np.int32),
        "cos_cache": np.cos(angles).astype(np.float32),
        "sin_cache": np.sin(angles).astype(np.float32),
    }
    for name, bits in (("past_key", "key_bits"), ("past_value", "value_bits")):
        shape = (len(lengths), kv_heads, past_positions, size * attributes[bits] // 8 + 4)
        rows = rng.integers(0, 256, shape, dtype=np.uint8)
        rows[..., -3] = 118  # scales near 2^-4 and zero points near the middle of the codes, as in a real cache
        rows[..., -2:] = [1 << (attributes[bits] - 1), 128]
        inputs[name] = rows
    return Case(operator, attributes, {name: inputs[name] for name in OPERATORS[operator].inputs})
