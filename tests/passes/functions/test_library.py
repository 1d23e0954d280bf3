"""One function for each name in a model, whatever attributes its nodes have; and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator
from ops_models import Case, attention_case, linear_case, model_of, run_in_onnxruntime

from bdq_passes.functions import attach_functions, functions_for
from bdq_runtime.opset import DOMAIN, OPERATORS

X = np.random.default_rng(0).standard_normal((2, 3, 192)).astype(np.float32)
HEADS = {"num_heads": 6, "kv_num_heads": 2, "head_size": 16, "scale": 0.25}
# weight bits, activation bits, block size, grid
LINEARS = [(2, 8, 0, 0), (3, 4, 32, 1), (4, 16, 64, 1), (8, 8, 0, 0), (3, 8, 0, 1)]
# local_window_size, softcap, hadamard, key_bits
ATTENTIONS = [(-1, 0.0, 0, 4), (3, 0.0, 1, 3), (5, 7.0, 0, 8)]


def _node(operator: str, **attributes: object) -> ir.Node:
    return ir.node(operator, [ir.Value(name="x")], attributes, domain=DOMAIN, name="n")


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_nodes_of_one_name_may_differ_in_all_attributes(level: str, tmp_path: Path) -> None:
    cases = [
        *(
            linear_case("LowBitLinear", X, 20 + b, weight_bits=b, activation_bits=a, block_size=block, weight_grid=grid)
            for b, a, block, grid in LINEARS
        ),
        *(Case("Hadamard", {"size": size}, {"x": X[..., : 3 * size]}) for size in (1, 4, 64)),
        Case("Hadamard", {"size": 128}, {"x": X[..., :128]}),
        *(Case("Hadamard", {"size": 4, "interleave": runs}, {"x": X[..., : 4 * runs]}) for runs in (3, 7)),
        *(
            linear_case(
                "HadamardLowBitLinear",
                X[..., :k],
                20,
                weight_bits=4,
                activation_bits=4,
                hadamard_size=4,
                hadamard_interleave=runs,
            )
            for k, runs in ((64, 1), (36, 9))
        ),
        *(Case("DynamicFakeQuantize", {"bits": bits}, {"x": X}) for bits in (3, 8, 16)),
        *(
            attention_case(
                "RotaryKVAttention",
                [5, 9],
                2,
                9,
                20,
                **{
                    "local_window_size": window,
                    "softcap": cap,
                    "hadamard": hadamard,
                    "key_bits": bits,
                    "value_bits": 4,
                },
                **HEADS,
            )
            for window, cap, hadamard, bits in ATTENTIONS
        ),
    ]
    model = model_of(*cases)
    assert len(model.functions) == 5
    onnx.checker.check_model(model, full_check=True)
    feeds = {f"{name}_{number}": array for number, case in enumerate(cases) for name, array in case.feeds.items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    expected = [output for case in cases for output in case.reference()]
    for found in (ReferenceEvaluator(model).run(None, feeds), run_in_onnxruntime(model, feeds, options)):
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b) or np.abs(a - b).max() <= 2e-6 * np.abs(b).max()
    opened = {node.op_type for node in onnx.load(tmp_path / "opened.onnx").graph.node}
    assert ("If" in opened) == (level == "ORT_DISABLE_ALL"), "ONNX Runtime does not choose when it opens the model"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_unpacked_once_when_a_model_is_opened(bits: int, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    case = linear_case("LowBitLinear", X, 20, weight_bits=bits, activation_bits=8)
    run_in_onnxruntime(model_of(case), case.feeds, options)
    opened = [node.op_type for node in onnx.load(tmp_path / "opened.onnx").graph.node]
    assert opened.count("MatMulInteger") == 1
    assert not {"BitShift", "BitwiseAnd", "Gather", "Transpose", "Slice"} & set(opened)


def test_attributes_that_a_node_leaves_out_are_written_to_it() -> None:
    model = ir.from_proto(model_of(Case("DynamicFakeQuantize", {"bits": 4}, {"x": X}), functions=False))
    attach_functions(model)
    assert model.graph[0].attributes["clip"].value == 1.0
    assert list(model.functions) == [(DOMAIN, "DynamicFakeQuantize", "")]
    attach_functions(model)  # a second time changes nothing
    assert len(model.functions) == 1


def test_a_function_takes_what_the_table_says() -> None:
    for case in (
        linear_case("HadamardGatedLowBitLinearBias", X, 5, weight_bits=4, activation_bits=8, hadamard_size=2),
        attention_case("RotaryKVAttention", [3], 3, 3, 0, key_bits=4, value_bits=4, **HEADS),
    ):
        (function,) = model_of(case).functions
        operator = OPERATORS[case.operator]
        assert list(function.input) == list(operator.inputs)
        assert list(function.attribute) == list(operator.attributes)
        assert {imported.domain: imported.version for imported in function.opset_import} == {"": 23}
        assert {node.domain for node in function.node} == {""}


def test_what_is_not_of_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="node n: no operator bdq::Hadamart"):
        functions_for([_node("Hadamart")], 23)
    with pytest.raises(ValueError, match=r"missing ones \['size'\]"):
        functions_for([_node("Hadamard")], 23)
    with pytest.raises(ValueError, match=r"unknown attributes \['sise'\]"):
        functions_for([_node("Hadamard", size=4, sise=4)], 23)
    with pytest.raises(ValueError, match="version 17 of the default domain"):
        functions_for([_node("Hadamard", size=4)], 17)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_runs_need_not_divide_the_channels_of_other_nodes(level: str) -> None:
    """ONNX Runtime infers shapes of branches that are not taken, too."""
    attributes = {"weight_bits": 4, "activation_bits": 4, "hadamard_size": 4}
    cases = [
        linear_case("HadamardLowBitLinear", X[..., :k], 20, hadamard_interleave=runs, **attributes)
        for k, runs in ((64, 1), (36, 9))
    ]
    model = model_of(*cases)
    for value, case in zip(model.graph.input, cases, strict=True):
        for dimension, size in zip(value.type.tensor_type.shape.dim, case.inputs["x"].shape, strict=True):
            dimension.dim_value = size
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    feeds = {f"x_{number}": case.inputs["x"] for number, case in enumerate(cases)}
    for found, case in zip(run_in_onnxruntime(model, feeds, options), cases, strict=True):
        np.testing.assert_array_equal(found, case.reference()[0])


def test_what_no_node_interleaves_has_no_nodes_for_it() -> None:
    attributes = {"K": 8, "N": 16, "weight_bits": 4, "activation_bits": 8, "hadamard_size": 4}
    x = ir.Value(name="x", shape=ir.Shape([None, None, 8]))
    for name, key, given in (
        ("Hadamard", "interleave", {"size": 4}),
        ("HadamardLowBitLinear", "hadamard_interleave", attributes),
    ):
        inputs = [x, *(ir.Value() for _ in range(len(OPERATORS[name].inputs) - 1))]
        plain, one, two = (
            list(functions_for([ir.node(name, inputs, given | more, domain=DOMAIN)], 23)[0])
            for more in ({}, {key: 1}, {key: 2})
        )
        counts = [Counter(node.op_type for node in nodes) for nodes in (plain, one, two)]
        assert counts[0] == counts[1]
        assert not set(counts[2]) - {*counts[1], "Transpose"}
        assert [counts[2][item] - counts[1][item] for item in ("Transpose", "Reshape", "Shape")] == [1, 2, 0]


def test_two_gates_in_one_model_are_refused() -> None:
    cases = [
        linear_case("GatedLowBitLinear", X, 5, weight_bits=4, activation_bits=8, gate=gate)
        for gate in ("silu", "gelu_tanh")
    ]
    with pytest.raises(ValueError, match=r"different gate: \['gelu_tanh', 'silu'\]"):
        model_of(*cases)


def test_shapes_are_known_behind_attention_and_a_lookup_in_panels() -> None:
    # ONNX Runtime plans memory in quadratic time where it does not know them: half a minute for 30 layers
    rows, sizes = ir.Value(name="rows"), ir.Value(name="sizes", shape=ir.Shape([3]))
    codes = ir.node("Reshape", [rows, sizes])
    centred = ir.node("Sub", [codes.outputs[0], ir.Value(name="zero", shape=ir.Shape([]))])
    attention = ir.node("GroupQueryAttention", [centred.outputs[0]], domain="com.microsoft")
    x = attention.outputs[0]
    attributes = {"K": 8, "N": 16, "weight_bits": 4, "activation_bits": 8, "hadamard_size": 4}
    for source, is_known in ((x, True), (ir.Value(name="x"), False)):
        node = ir.node("HadamardLowBitLinear", [source, *(ir.Value() for _ in range(3))], attributes, domain=DOMAIN)
        assert ("Shape" in {item.op_type for item in functions_for([node], 23)[0]}) != is_known
