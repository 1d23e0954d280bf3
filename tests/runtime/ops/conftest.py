"""Models of one `bdq` node, run by the library, by its function body, or by the NumPy reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from bdq_runtime.library import LibraryMissingError, library_info, register
from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION, Operator
from bdq_runtime.panels import interleave_panels, pack_panels, pack_scales
from bdq_runtime.reference.onnx_operators import evaluate

Array = npt.NDArray[Any]

_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int32": TensorProto.INT32}
_CONSTANTS = ("weight", "scales", "bias", "diagonal", "cos_cache", "sin_cache")

try:
    ISAS = library_info().isas
except LibraryMissingError:
    ISAS = ()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ISAS:
        for item in items:
            if "/runtime/ops/" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="the op library was not built"))


@dataclass(frozen=True, eq=False)
class OneNode:
    """A model of one node, and what to feed it.

    Attributes:
        operator: what the node is.
        inputs: an array for each input; weights and tables become initializers.
        attributes: of the node.
    """

    operator: Operator
    inputs: Mapping[str, Array]
    attributes: Mapping[str, Any]

    def with_input(self, name: str, array: Array) -> OneNode:
        """The same with another array."""
        return replace(self, inputs={**self.inputs, name: array})

    def with_attributes(self, **values: Any) -> OneNode:
        """The same with other attributes; None leaves one out."""
        merged = {**self.attributes, **values}
        return replace(self, attributes={name: value for name, value in merged.items() if value is not None})

    def proto(self, constants: Sequence[str] = _CONSTANTS, shapes: bool = True) -> onnx.ModelProto:
        """The model; inputs not in `constants` are graph inputs, their shapes known or not."""
        node = helper.make_node(
            self.operator.name,
            list(self.operator.inputs),
            list(self.operator.outputs),
            domain=DOMAIN,
            name="the_node",
            **self.attributes,
        )
        fed = [name for name in self.inputs if name not in constants]
        inputs = [
            helper.make_tensor_value_info(
                name, _TYPES[self.operator.inputs[name]], self.inputs[name].shape if shapes else None
            )
            for name in fed
        ]
        outputs = [helper.make_tensor_value_info(n, _TYPES[t], None) for n, t in self.operator.outputs.items()]
        weights = [numpy_helper.from_array(self.inputs[name], name) for name in self.inputs if name in constants]
        graph = helper.make_graph([node], "one_node", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def feeds(self) -> dict[str, Array]:
        """What `proto()` wants to be fed."""
        return {name: array for name, array in self.inputs.items() if name not in _CONSTANTS}

    def reference(self) -> tuple[Array, ...]:
        """The outputs by NumPy."""
        inputs = [self.inputs[name] for name in self.operator.inputs]
        return evaluate(self.operator, inputs, dict(self.attributes))


def open_proto(proto: onnx.ModelProto, isa: str | None = None, threads: int = 1) -> ort.InferenceSession:
    """A session with the library's kernels for `isa`."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores to others
    if isa:
        options.add_session_config_entry("bdq.isa", isa)
    register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def run_kernel() -> Callable[..., list[Array]]:
    """Run a `OneNode` with the library: `run_kernel(node, isa)`; the outputs."""

    def run(node: OneNode, isa: str | None = None, threads: int = 1) -> list[Array]:
        outputs: list[Array] = open_proto(node.proto(), isa, threads).run(None, node.feeds())
        return outputs

    return run


@pytest.fixture
def open_node() -> Callable[..., ort.InferenceSession]:
    """Open a model: `open_node(proto, isa=None, threads=1)`."""
    return open_proto


@pytest.fixture
def open_everywhere() -> Callable[[onnx.ModelProto], dict[str, ort.InferenceSession]]:
    """Open a model once for each instruction set: `open_everywhere(proto)`."""
    return lambda proto: {isa: open_proto(proto, isa) for isa in ISAS}


@pytest.fixture(params=ISAS or ("none",))
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that the library has and this machine can run."""
    return str(request.param)


@pytest.fixture
def random(request: pytest.FixtureRequest) -> np.random.Generator:
    """Seeded by the test's name: the same numbers in each run, others in each test."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def linear_node(random: np.random.Generator) -> Callable[..., OneNode]:
    """A linear operator with random weights: `linear_node("LowBitLinear", M, K, N, weight_bits=..., ...)`."""

    def make(name: str, m: int, k: int, n: int, **attributes: Any) -> OneNode:
        operator = OPERATORS[name]
        given = {"K": k, "N": n, "weight_bits": 4, "activation_bits": 8, **attributes}
        if "hadamard_size" in operator.attributes:
            given.setdefault("hadamard_size", k & -k)  # the largest power of two that divides K
        bits, block = given["weight_bits"], given.get("block_size") or k
        halves = []
        for _ in range(2 if "gate" in operator.attributes else 1):
            codes = random.integers(0, 1 << bits, (n, k), dtype=np.uint8)
            scales = random.uniform(0.5, 2.0, (n, -(-k // block))) * 2.0**-bits / k**0.5
            halves.append((pack_panels(codes, bits), pack_scales(scales)))
        weight, scales = halves[0] if len(halves) == 1 else map(interleave_panels, *halves)
        inputs = {
            "x": random.standard_normal((m, k)).astype(np.float32),
            "diagonal": random.uniform(0.5, 2.0, k).astype(np.float32),
            "weight": weight,
            "scales": scales,
            "bias": random.standard_normal(n * len(halves)).astype(np.float32),
        }
        return OneNode(operator, {name: inputs[name] for name in operator.inputs}, given)

    return make


@pytest.fixture
def attention_node(random: np.random.Generator) -> Callable[..., OneNode]:
    """An attention operator whose past holds random rows: `attention_node("KVAttention", past=5, tokens=1, ...)`.

    `past` is a number of tokens, or one for each row of the batch; `room` more positions are in the buffer.
    """

    def make(
        name: str,
        past: int | Sequence[int] = 0,
        tokens: int = 1,
        heads: tuple[int, int, int] = (4, 2, 16),
        rotary_dim: int | None = None,
        room: int = 0,
        **attributes: Any,
    ) -> OneNode:
        operator = OPERATORS[name]
        pasts = np.atleast_1d(past)
        batch, (q_heads, kv_heads, size) = len(pasts), heads
        given: dict[str, Any] = {
            "num_heads": q_heads,
            "kv_num_heads": kv_heads,
            "head_size": size,
            "key_bits": 4,
            "value_bits": 4,
            "scale": size**-0.5,
            **attributes,
        }
        total = int(pasts.max()) + tokens
        angles = random.uniform(0, 6.3, (total + 3, (rotary_dim or size) // 2))
        sizes = {"query": q_heads, "key": kv_heads, "value": kv_heads, "qkv": q_heads + 2 * kv_heads}
        inputs = {
            part: (random.standard_normal((batch, tokens, count * size)) * 2).astype(np.float32)
            for part, count in sizes.items()
        }
        for part in ("key", "value"):
            row = size * given[f"{part}_bits"] // 8 + 4
            rows = random.integers(0, 256, (batch, kv_heads, int(pasts.max()) + room, row), dtype=np.uint8)
            # scales of a few hundredths, zero points near the middle
            rows[..., -4:-2] = np.frombuffer(np.uint16(random.integers(1024 * 26, 1024 * 28)).tobytes(), np.uint8)
            middle = 32768 + (1 << (given[f"{part}_bits"] - 1))
            rows[..., -2:] = np.frombuffer(np.uint16(middle).tobytes(), np.uint8)
            inputs[f"past_{part}"] = rows
        inputs["seqlens_k"] = (pasts + tokens - 1).astype(np.int32)
        inputs["total_sequence_length"] = np.array(total, np.int32)
        inputs["cos_cache"], inputs["sin_cache"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        return OneNode(operator, {name: inputs[name] for name in operator.inputs}, given)

    return make
