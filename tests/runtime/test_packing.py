"""What the bits mean: packing has an inverse, and ONNX Runtime reads the bytes as we do."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bdq_runtime.packing import (
    PerBlock,
    PerChannel,
    QuantizedWeight,
    QuantSpec,
    concatenate_rows,
    pack_bits,
    pack_codes,
    pack_matmul_nbits,
    unpack_bits,
    with_blocks,
)

BITS = st.integers(2, 8)
settings = hypothesis.settings(max_examples=100, deadline=None)


def _weight(rows: int, columns: int, spec: QuantSpec, seed: int = 0) -> QuantizedWeight:
    random = np.random.default_rng(seed)
    blocks = -(-columns // spec.block_size(columns))
    top = 1 << spec.bits
    zeros = None if spec.symmetric else random.integers(0, top, (rows, blocks)).astype(np.uint8)
    scales = (random.random((rows, blocks)) + 0.5).astype(np.float32)
    return QuantizedWeight(random.integers(0, top, (rows, columns)).astype(np.uint8), scales, zeros, spec)


@settings
@hypothesis.given(bits=BITS, rows=st.integers(1, 4), count=st.integers(1, 70), seed=st.integers(0, 2**16))
def test_unpack_is_the_inverse_of_pack(bits: int, rows: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, -(-count * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), codes)


@settings
@hypothesis.given(bits=BITS, codes=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_packing_is_a_little_endian_number(bits: int, codes: list[int]) -> None:
    limited = [code % (1 << bits) for code in codes]
    number = sum(code << (bits * index) for index, code in enumerate(limited))
    packed = pack_bits(np.array(limited, np.uint8), bits)
    assert int.from_bytes(packed.tobytes(), "little") == number


def test_known_bytes() -> None:
    assert pack_bits(np.array([1, 2, 3], np.uint8), 4).tolist() == [0x21, 0x03]
    assert pack_bits(np.array([1, 2, 3, 0, 1], np.uint8), 2).tolist() == [0b00111001, 1]
    assert pack_bits(np.array([5, 6, 7], np.uint8), 3).tolist() == [0b11110101, 1]


@settings
@hypothesis.given(
    bits=st.sampled_from([2, 3, 4, 8]), rows=st.integers(1, 5), columns=st.integers(1, 100), symmetric=st.booleans()
)
def test_packed_weight_reads_back(bits: int, rows: int, columns: int, symmetric: bool) -> None:
    weight = _weight(rows, columns, QuantSpec(bits, PerBlock(16), symmetric))
    packed, scales, zeros = pack_matmul_nbits(weight)
    blocks = -(-columns // 16)
    assert packed.shape == (rows, blocks, 16 * bits // 8)
    codes = unpack_bits(packed, bits, 16).reshape(rows, -1)
    np.testing.assert_array_equal(codes[:, :columns], weight.codes)
    assert not codes[:, columns:].any()
    assert scales is weight.scales
    if zeros is not None:
        np.testing.assert_array_equal(unpack_bits(zeros, bits, blocks), weight.zero_points)


def test_eight_bits_are_not_copied() -> None:
    weight = _weight(4, 64, QuantSpec(8, PerBlock(32)))
    assert np.shares_memory(pack_codes(weight), weight.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dequantize_by_hand(symmetric: bool) -> None:
    zeros = None if symmetric else np.array([[3, 1]], np.uint8)
    spec = QuantSpec(4, PerBlock(16), symmetric)
    codes = np.arange(18, dtype=np.uint8)[None] % 16
    weight = QuantizedWeight(codes, np.array([[0.5, -2.0]], np.float32), zeros, spec)
    first, second = (8, 8) if symmetric else (3, 1)
    expected = [(code - first) * 0.5 for code in range(16)] + [(0 - second) * -2.0, (1 - second) * -2.0]
    assert weight.dequantize().tolist() == [expected]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_odd_levels_are_odd_multiples_of_the_scale(bits: int) -> None:
    spec = QuantSpec(bits, PerBlock(16), grid="odd")
    codes = np.arange(1 << bits, dtype=np.uint8)[None]
    weight = QuantizedWeight(codes, np.full((1, 1), 0.25, np.float32), None, spec)
    top = (1 << bits) - 1
    assert weight.dequantize().tolist() == [[level * 0.25 for level in range(-top, top + 1, 2)]]


def test_odd_blocks_have_the_values_of_the_channel() -> None:
    weight = _weight(3, 64, QuantSpec(3, PerChannel(), grid="odd"))
    np.testing.assert_array_equal(with_blocks(weight).dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    ("bits", "symmetric", "grid", "message"),
    [
        (8, True, "odd", "the odd grid with symmetric 8 bits"),
        (4, False, "odd", "the odd grid with asymmetric 4 bits"),
        (4, True, "even", "grid is 'even', expected 'integer' or 'odd'"),
    ],
)
def test_impossible_grid_is_an_error(bits: int, symmetric: bool, grid: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec(bits, PerChannel(), symmetric, grid=grid)


def test_matmul_nbits_has_no_odd_grid() -> None:
    with pytest.raises(ValueError, match="odd grid"):
        pack_matmul_nbits(_weight(2, 32, QuantSpec(4, PerBlock(32), grid="odd")))


@settings
@hypothesis.given(columns=st.integers(1, 300), symmetric=st.booleans(), bits=st.sampled_from([2, 4, 8]))
def test_blocks_have_the_values_of_the_channel(columns: int, symmetric: bool, bits: int) -> None:
    weight = _weight(3, columns, QuantSpec(bits, PerChannel(), symmetric))
    blocked = with_blocks(weight)
    assert isinstance(blocked.spec.granularity, PerBlock)
    np.testing.assert_array_equal(blocked.dequantize(), weight.dequantize())


def test_blocks_stay_as_they_are() -> None:
    weight = _weight(3, 64, QuantSpec(4, PerBlock(32)))
    assert with_blocks(weight) is weight


@pytest.mark.parametrize("symmetric", [True, False])
def test_concatenated_rows_are_the_parts(symmetric: bool) -> None:
    spec = QuantSpec(4, PerBlock(16), symmetric)
    parts = [_weight(rows, 40, spec, rows) for rows in (3, 5)]
    joined = concatenate_rows(parts).dequantize()
    np.testing.assert_array_equal(joined, np.concatenate([part.dequantize() for part in parts]))


def test_concatenating_different_specs_is_an_error() -> None:
    with pytest.raises(ValueError, match="specs differ"):
        concatenate_rows([_weight(2, 32, QuantSpec(4, PerBlock(16))), _weight(2, 32, QuantSpec(8, PerBlock(16)))])


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_bits_are_an_error(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}, expected 2 to 8"):
        QuantSpec(bits, PerChannel())


def test_impossible_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="block size is 48"):
        QuantSpec(4, PerBlock(48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": np.ones((2, 3), np.float32)}, r"scales are \(2, 3\), expected \(2, 2\)"),
        ({"scales": np.ones((2, 2))}, "scales float64: expected uint8, float32"),
        ({"codes": np.zeros((2, 32), np.int8)}, "codes int8"),
        ({"zero_points": np.zeros((2, 2), np.uint8)}, "zero points go with an asymmetric spec"),
        ({"zero_points": np.zeros((2, 1), np.uint8)}, r"zero points are \(2, 1\)"),
    ],
)
def test_inconsistent_weight_is_an_error(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {
        "codes": np.zeros((2, 32), np.uint8),
        "scales": np.ones((2, 2), np.float32),
        "zero_points": None,
        "spec": QuantSpec(4, PerBlock(16)),
    }
    with pytest.raises(ValueError, match=message):
        QuantizedWeight(**{**fields, **change})


def _kernel(weight: QuantizedWeight, x: Any) -> Any:
    """What ONNX Runtime's MatMulNBits makes of the packed weight, in float32."""
    n, k = weight.codes.shape
    arrays = dict(zip(("codes", "scales", "zeros"), pack_matmul_nbits(weight), strict=True))
    constants = [
        ir.Value(name=name, const_value=ir.Tensor(array, name=name))
        for name, array in arrays.items()
        if array is not None
    ]
    data = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", k]))
    attributes = {"K": k, "N": n, "bits": weight.spec.bits, "block_size": weight.spec.block_size(k)}
    node = ir.node("MatMulNBits", [data, *constants], attributes, domain="com.microsoft")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph([data], node.outputs, nodes=[node], initializers=constants, opset_imports=opsets, name="one")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([16, 32, 64, 128, 256]),
    symmetric=st.booleans(),
    rows=st.integers(1, 33),
    columns=st.integers(1, 300),
)
def test_the_kernel_reads_what_we_wrote(bits: int, block: int, symmetric: bool, rows: int, columns: int) -> None:
    weight = _weight(rows, columns, QuantSpec(bits, PerBlock(block), symmetric))
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    wide = weight.dequantize().astype(np.float64)
    size = np.abs(x) @ np.abs(wide).T
    assert (np.abs(_kernel(weight, x) - x @ wide.T) <= 2e-6 * size + 1e-9).all()


def test_a_wrong_scale_is_seen() -> None:
    weight = _weight(8, 64, QuantSpec(4, PerBlock(32)))
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    wide = weight.dequantize().astype(np.float64) * 1.01
    size = np.abs(x) @ np.abs(wide).T
    assert not (np.abs(_kernel(weight, x) - x @ wide.T) <= 2e-6 * size).all()
