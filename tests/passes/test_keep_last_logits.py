"""The logits of the last positions, as many as asked for, one by default."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from bdq_passes import AnnotateLinearsPass, KeepLastLogitsPass, Level, verify


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(("keep", "rows"), [(None, 1), (1, 1), (3, 3), (5, 5), (9, 5), (0, 5)])
def test_rows(tiny: Any, run: Any, ids: Any, keep: int | None, rows: int, optimize: bool) -> None:
    every = run(tiny().model, {"input_ids": ids})
    model = tiny().model
    assert KeepLastLogitsPass()(model).modified
    feeds = {"input_ids": ids} | ({} if keep is None else {"logits_to_keep": np.array(keep)})
    found = run(model, feeds, optimize=optimize)
    assert found.shape == (2, rows, every.shape[2])
    np.testing.assert_allclose(found, every[:, -rows:], rtol=0, atol=1e-4)


def test_input_is_optional_and_not_folded(tiny: Any) -> None:
    model = tiny().model
    KeepLastLogitsPass()(model)
    proto = ir.to_proto(model)
    assert "logits_to_keep" in [value.name for value in proto.graph.input]
    assert "logits_to_keep" in [tensor.name for tensor in proto.graph.initializer]


def test_output_is_declared_with_one_position(tiny: Any) -> None:
    # onnxruntime-genai allocates as many positions as the prompt has unless this dimension is 1.
    model = tiny().model
    KeepLastLogitsPass()(model)
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert (str(shape[0]), shape[1]) == ("batch", 1)


def test_second_run_changes_nothing(tiny: Any) -> None:
    model = tiny().model
    KeepLastLogitsPass()(model)
    assert not KeepLastLogitsPass()(model).modified


def test_annotated_stays_annotated(tiny: Any) -> None:
    model = tiny().model
    AnnotateLinearsPass(expected=3)(model)
    KeepLastLogitsPass()(model)
    verify(model, Level.ANNOTATED)


def test_missing_head_is_an_error(tiny: Any) -> None:
    with pytest.raises(ValueError, match="0 linears are named output, expected 1"):
        KeepLastLogitsPass(linear="output")(tiny().model)
