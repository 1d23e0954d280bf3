"""The `bdq` operators for onnx's evaluator: `ReferenceEvaluator(model, new_ops=reference_operators())`.

The one module of the package that imports onnx; nothing that runs in production imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun

from bdq_runtime.opset import DOMAIN, OPERATORS, Operator
from bdq_runtime.reference.activations import dynamic_fake_quantize
from bdq_runtime.reference.attention import kv_attention, split_qkv
from bdq_runtime.reference.hadamard import hadamard
from bdq_runtime.reference.linear import low_bit_linear

Array = npt.NDArray[Any]


def evaluate(operator: Operator, inputs: list[Array], attributes: dict[str, Any]) -> tuple[Array, ...]:
    """The outputs of a node; attributes that it leaves out have the values of the table.

    Raises:
        ValueError: inputs or attributes that the operator does not take, or lacks.
    """
    if len(inputs) != len(operator.inputs):
        raise ValueError(f"{operator.name} has {len(inputs)} inputs, expected {list(operator.inputs)}")
    unknown, missing = set(attributes) - set(operator.attributes), set(operator.required_attributes) - set(attributes)
    if unknown or missing:
        raise ValueError(f"{operator.name}: unknown attributes {sorted(unknown)}, missing ones {sorted(missing)}")
    for (name, kind), array in zip(operator.inputs.items(), inputs, strict=True):
        if array.dtype != np.dtype(kind):
            raise ValueError(f"{operator.name}: {name} is {array.dtype}, expected {kind}")
    given = {**operator.attributes, **attributes}
    return _family(operator)(dict(zip(operator.inputs, inputs, strict=True)), given)


def reference_operators() -> list[type[OpRun]]:
    """One class for each operator of the table, of its name."""
    return [_operator_class(operator) for operator in OPERATORS.values()]


def _operator_class(operator: Operator) -> type[OpRun]:
    def _run(self: OpRun, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        return evaluate(operator, list(inputs), attributes)

    return type(
        operator.name, (OpRun,), {"op_domain": DOMAIN, "_run": _run, "__doc__": f"`{DOMAIN}::{operator.name}`."}
    )


def _family(operator: Operator) -> Callable[[dict[str, Array], dict[str, Any]], tuple[Array, ...]]:
    if "weight" in operator.inputs:
        return _linear
    if "past_key" in operator.inputs:
        return _attention
    return {"Hadamard": _hadamard, "DynamicFakeQuantize": _fake_quantize}[operator.name]


def _linear(inputs: dict[str, Array], attributes: dict[str, Any]) -> tuple[Array, ...]:
    names = ("weight_bits", "weight_grid", "block_size", "activation_bits", "activation_clip")
    if inputs["x"].shape[-1] != attributes["K"]:
        raise ValueError(f"x has {inputs['x'].shape[-1]} channels, expected K = {attributes['K']}")
    y = low_bit_linear(
        inputs["x"],
        inputs["weight"],
        inputs["scales"],
        n=attributes["N"],
        bias=inputs.get("bias"),
        diagonal=inputs.get("diagonal"),
        hadamard_size=attributes.get("hadamard_size", 0),
        hadamard_interleave=attributes.get("hadamard_interleave", 1),
        gate=attributes.get("gate"),
        **{name: attributes[name] for name in names},
    )
    return (y,)


def _attention(inputs: dict[str, Array], attributes: dict[str, Any]) -> tuple[Array, ...]:
    heads = {name: attributes[name] for name in ("num_heads", "kv_num_heads", "head_size")}
    rest = {name: array for name, array in inputs.items() if name != "qkv"}
    if "qkv" in inputs:
        rest.update(zip(("query", "key", "value"), split_qkv(inputs["qkv"], **heads), strict=True))
    rest["total_sequence_length"] = int(rest["total_sequence_length"].item())  # type: ignore[assignment]
    found = kv_attention(**rest, **attributes)  # type: ignore[arg-type]
    return found.output, found.present_key, found.present_value


def _hadamard(inputs: dict[str, Array], attributes: dict[str, Any]) -> tuple[Array, ...]:
    return (hadamard(inputs["x"], attributes["size"], attributes["interleave"]),)


def _fake_quantize(inputs: dict[str, Array], attributes: dict[str, Any]) -> tuple[Array, ...]:
    return (dynamic_fake_quantize(inputs["x"], attributes["bits"], attributes["clip"]),)
