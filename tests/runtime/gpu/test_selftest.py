"""The test of a user's GPU: it finds what is wrong, and says so when there is nothing to test."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from bdq_runtime import gpu_selftest
from bdq_runtime.gpu.cases import CASES, Case
from bdq_runtime.gpu_selftest import compare, main, run_cases
from bdq_runtime.opset import DOMAIN, OPERATORS


def test_every_operator_has_a_case() -> None:
    assert {case.operator for case in CASES.values()} == set(OPERATORS)


@pytest.mark.parametrize("name", CASES)
def test_models_are_what_onnx_reads(name: str) -> None:
    case = CASES[name]
    model = onnx.load_from_string(case.model())
    node = model.graph.node[0]
    assert (node.domain, node.op_type, list(node.input)) == (DOMAIN, case.operator, list(case.inputs))
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    expected = {k: v.encode() if isinstance(v, str) else v for k, v in case.attributes.items()}
    assert found == {k: np.float32(v) if isinstance(v, float) else v for k, v in expected.items()}
    for weight in model.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(weight), case.inputs[weight.name])
    assert {value.name for value in model.graph.input} == set(case.feeds())


@pytest.mark.parametrize("name", ["gemv", "gemm blocks, bias", "prompt", "hadamard"])
def test_one_percent_is_found(name: str) -> None:
    case = CASES[name]
    outputs = list(case.expected())
    assert compare(case, outputs)[0]
    assert not compare(case, [outputs[0] * np.float32(1.01), *outputs[1:]])[0]
    assert not compare(case, [np.full_like(outputs[0], np.nan), *outputs[1:]])[0]
    assert not compare(case, [outputs[0][..., :-1], *outputs[1:]])[0]


def test_a_wrong_byte_of_a_cache_is_found() -> None:
    case = CASES["prompt"]
    output, key, value = case.expected()
    key[0, 1, 2, 3] ^= 1
    right, words = compare(case, [output, key, value])
    assert not right
    assert "1 of" in words


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def run(case: Case) -> list[np.ndarray]:
        if case.operator == "Hadamard":
            raise RuntimeError("no kernel image\nfor this GPU")
        return [output * np.float32(1.01) for output in case.expected()]

    chosen = {name: CASES[name] for name in ("hadamard", "gemv")}
    assert run_cases(chosen, run) == 2
    shown = capsys.readouterr().out
    assert shown.count("FAIL") == 2
    assert "no kernel image for this GPU" in shown


def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BDQ_CUDA", "")
    monkeypatch.setattr(gpu_selftest.ort, "set_default_logger_severity", lambda _: None)
    if gpu_selftest.PROVIDER in ort.get_available_providers():
        pytest.skip("this onnxruntime may find a GPU")
    assert main([]) == 2
    captured = capsys.readouterr()
    assert "NOT tested" in captured.err
    assert "install onnxruntime-gpu" in captured.err
    assert captured.out == ""
