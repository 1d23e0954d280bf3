"""Linear operators as models of their own: a `bdq::LowBitLinear` or a `com.microsoft::MatMulNBits`, as often as wanted.

All nodes of a model read the same input; each has weights in memory of its own, so that a model with enough nodes finds
none of them in a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from bdq_runtime.library import register
from bdq_runtime.opset import DOMAIN, VERSION
from bdq_runtime.panels import pack_panels, pack_scales

Array = npt.NDArray[Any]

PAGE = 4096
CONTRIB = "com.microsoft"
NBITS = 4
ACCURACY_LEVEL = 4
COLD_ROWS = 16
"""Up to so many rows, reading the weights is what takes the time."""
FEW_MACS = 1 << 30
"""Multiply-accumulates of a call with more rows; what ONNX Runtime adds to a call is nothing beside them."""

_TYPES = {"uint8": TensorProto.UINT8, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


@dataclass(frozen=True)
class Shape:
    """Channels in and out of a linear."""

    k: int
    n: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """`KxN`."""
        k, _, n = text.partition("x")
        if not (k.isdecimal() and n.isdecimal() and int(k) and int(n)):
            raise argparse.ArgumentTypeError(f"{text!r} is not KxN")
        return cls(int(k), int(n))

    def __str__(self) -> str:
        return f"{self.k}, {self.n}"


@dataclass(frozen=True, eq=False)
class OpenLinear:
    """A session.

    Attributes:
        nodes: in its model.
        run: one call.
        x: what all nodes read.
        y: where each node writes its result.
        weights: of the nodes; the session reads them here.
    """

    nodes: int
    run: Callable[[], None]
    x: Array
    y: Array
    weights: Sequence[Array]


@dataclass(frozen=True, eq=False)
class Linear:
    """One node.

    Attributes:
        operator: its type.
        domain: of the type.
        shape: what it multiplies with.
        attributes: of the node.
        weights: input name -> array, in the order of the inputs behind `x`.
    """

    operator: str
    domain: str
    shape: Shape
    attributes: Mapping[str, Any]
    weights: Mapping[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes that a product with one row has to read."""
        return sum(array.nbytes for array in self.weights.values())

    def model(self, nodes: int) -> onnx.ModelProto:
        """`nodes` of it on the same input; outputs `y0`, `y1`, ... Its weights come with the session."""
        graph = helper.make_graph(
            [
                helper.make_node(
                    self.operator, ["x", *self._names(i)], [f"y{i}"], domain=self.domain, **self.attributes
                )
                for i in range(nodes)
            ],
            "linears",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", self.shape.k])],
            [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", self.shape.n]) for i in range(nodes)],
            [
                _external(name, array)
                for i in range(nodes)
                for name, array in zip(self._names(i), self.weights.values(), strict=True)
            ],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1), helper.make_opsetid(DOMAIN, VERSION)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def open(self, nodes: int, x: Array, threads: int) -> OpenLinear:
        """`model(nodes)` on `x`; what it reads and writes is bound once, so that a call neither allocates nor copies.

        Raises:
            LibraryError: the library with our kernels is missing.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")  # or one's idle threads disturb the next
        register(options)
        names = [name for i in range(nodes) for name in self._names(i)]
        weights = [aligned_copy(array) for _ in range(nodes) for array in self.weights.values()]
        options.add_external_initializers(names, [ort.OrtValue.ortvalue_from_numpy(array) for array in weights])
        model = self.model(nodes).SerializeToString()
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        y = np.zeros((len(x), self.shape.n), np.float32)
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x))
        for i in range(nodes):
            binding.bind_ortvalue_output(f"y{i}", ort.OrtValue.ortvalue_from_numpy(y))
        return OpenLinear(nodes, lambda: session.run_with_iobinding(binding), x, y, weights)

    def _names(self, node: int) -> list[str]:
        return [f"{name}{node}" for name in self.weights]


def low_bit_linear(shape: Shape, weight_bits: int, activation_bits: int, random: np.random.Generator) -> Linear:
    """Ours, per channel."""
    codes = random.integers(0, 1 << weight_bits, (shape.n, shape.k), dtype=np.uint8)
    scales = random.uniform(0.5, 2.0, (shape.n, 1)) * 2.0**-weight_bits / shape.k**0.5
    attributes = {"K": shape.k, "N": shape.n, "weight_bits": weight_bits, "activation_bits": activation_bits}
    weights = {"weight": pack_panels(codes, weight_bits), "scales": pack_scales(scales)}
    return Linear("LowBitLinear", DOMAIN, shape, attributes, weights)


def matmul_nbits(shape: Shape, block: int, random: np.random.Generator) -> Linear | None:
    """Theirs, symmetric, activations of 8 bits; None where blocks would need padding."""
    if shape.k % block:
        return None
    blocks = shape.k // block
    codes = random.integers(0, 256, (shape.n, blocks, block * NBITS // 8), dtype=np.uint8)
    scales = (random.uniform(0.5, 2.0, (shape.n, blocks)) * 2.0**-NBITS / shape.k**0.5).astype(np.float32)
    attributes = {
        "K": shape.k, "N": shape.n, "bits": NBITS, "block_size": block, "accuracy_level": ACCURACY_LEVEL,
    }  # fmt: skip
    return Linear("MatMulNBits", CONTRIB, shape, attributes, {"B": codes, "scales": scales})


def nodes_for(linear: Linear, rows: int, cold_bytes: int) -> int:
    """Nodes of a model: with few rows so many that their weights are `cold_bytes`, otherwise a few."""
    if rows <= COLD_ROWS:
        return -(-cold_bytes // linear.nbytes)
    return -(-FEW_MACS // (rows * linear.shape.k * linear.shape.n))


def aligned_copy(array: Array) -> Array:
    """A copy that begins with a page, as the data of a file does; NumPy's own begin anywhere in a cache line."""
    memory = np.empty(array.nbytes + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _external(name: str, array: Array) -> TensorProto:
    """What stands for an initializer that the session options bring."""
    tensor = TensorProto(name=name, dims=array.shape, data_type=_TYPES[array.dtype.name])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="given_with_the_session")
    return tensor
