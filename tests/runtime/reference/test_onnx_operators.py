"""Every operator of the table runs in onnx's evaluator, with its defaults, and refuses what it does not take."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from bdq_runtime.opset import DOMAIN, OPERATORS, VERSION
from bdq_runtime.panels import pack_panels, pack_scales
from bdq_runtime.reference import hadamard, low_bit_linear
from bdq_runtime.reference.onnx_operators import evaluate, reference_operators


def test_the_classes_are_the_table() -> None:
    classes = {operator.__name__: operator for operator in reference_operators()}
    assert list(classes) == list(OPERATORS)
    assert {operator.op_domain for operator in classes.values()} == {DOMAIN}


def test_a_node_runs_with_the_defaults_of_the_table() -> None:
    x = np.random.default_rng(0).standard_normal((2, 40)).astype(np.float32)
    weight = pack_panels(np.random.default_rng(1).integers(0, 4, (5, 40), dtype=np.uint8), 2)
    scales = pack_scales(np.ones((5, 1), np.float16))
    attributes = {"K": 40, "N": 5, "weight_bits": 2, "activation_bits": 4}
    node = helper.make_node("LowBitLinear", ["x", "weight", "scales"], ["y"], domain=DOMAIN, **attributes)
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape),
        helper.make_tensor_value_info("weight", TensorProto.UINT8, weight.shape),
        helper.make_tensor_value_info("scales", TensorProto.FLOAT16, scales.shape),
    ]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 5])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, VERSION)])
    feeds = {"x": x, "weight": weight, "scales": scales}
    (y,) = ReferenceEvaluator(model, new_ops=reference_operators()).run(None, feeds)
    assert np.array_equal(y, low_bit_linear(x, weight, scales, n=5, weight_bits=2, activation_bits=4))


def test_interleaving_reaches_the_transform() -> None:
    x = np.random.default_rng(2).standard_normal((2, 24)).astype(np.float32)
    (y,) = evaluate(OPERATORS["Hadamard"], [x], {"size": 8, "interleave": 3})
    assert np.array_equal(y, hadamard(x, 8, 3))
    assert not np.array_equal(y, hadamard(x, 8))


def test_nodes_that_are_not_of_the_table_are_refused() -> None:
    operator, x = OPERATORS["Hadamard"], np.ones((1, 8), np.float32)
    with pytest.raises(ValueError, match=r"missing ones \['size'\]"):
        evaluate(operator, [x], {})
    with pytest.raises(ValueError, match=r"unknown attributes \['axis'\]"):
        evaluate(operator, [x], {"size": 8, "axis": 1})
    with pytest.raises(ValueError, match="x is float64, expected float32"):
        evaluate(operator, [x.astype(np.float64)], {"size": 8})


def test_the_references_import_no_onnx() -> None:
    code = "import sys, bdq_runtime.reference; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
