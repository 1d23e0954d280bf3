"""Padding that GroupQueryAttention would compute wrongly is an error that says what is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from bdq_passes import KeepLastLogitsPass, RefusePaddingPass
from bdq_passes.refuse_padding import LEFT, RIGHT

_SHAPE = [2, 2, 0, 8]

_TEXT = """
<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
attention (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
           float[batch, 2, past, 8] past_key, float[batch, 2, past, 8] past_value,
           float[30, 16] table, float[16, 16] head)
    => (float[batch, sequence, 16] logits,
        float[batch, 2, total, 8] present_key, float[batch, 2, total, 8] present_value)
    <int64[1] axis = {1}, int64 one = {1}>
{
    query = Gather(table, input_ids)
    count = ReduceSum<keepdims = 0>(attention_mask, axis)
    last = Sub(count, one)
    lengths = Cast<to = 6>(last)
    shape = Shape(attention_mask)
    total64 = Gather(shape, one)
    total = Cast<to = 6>(total64)
    mixed, present_key, present_value = com.microsoft.GroupQueryAttention<num_heads = 2, kv_num_heads = 2>
        (query, query, query, past_key, past_value, lengths, total)
    logits = MatMul(mixed, head)
}
"""


@pytest.fixture
def attention() -> ir.Model:
    """Embedding -> GroupQueryAttention -> lm_head."""
    random = np.random.default_rng(0)
    model = ir.from_onnx_text(_TEXT)
    for value in list(model.graph.inputs)[-2:]:
        assert value.shape is not None
        value.const_value = ir.Tensor(random.standard_normal(value.shape.numpy()).astype(np.float32), name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    for node in model.graph:
        if node.op_type == "MatMul":
            node.metadata_props["bdq.parts"] = "lm_head"
    return model


def _feeds(mask: list[list[int]], keep: int | None = None) -> dict[str, Any]:
    empty = np.zeros(_SHAPE, np.float32)
    ids = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    feeds = {"input_ids": ids, "attention_mask": np.array(mask), "past_key": empty, "past_value": empty}
    return feeds if keep is None else {**feeds, "logits_to_keep": np.array(keep)}


FULL = [[1, 1, 1, 1], [1, 1, 1, 1]]
LEFT_PADDED = [[1, 1, 1, 1], [0, 1, 1, 1]]
RIGHT_PADDED = [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("optimize", [False, True])
def test_full_rows_are_unchanged(attention: ir.Model, run: Any, optimize: bool) -> None:
    expected = run(attention, _feeds(FULL))[0]
    assert RefusePaddingPass()(attention).modified
    np.testing.assert_array_equal(run(attention, _feeds(FULL), optimize=optimize)[0], expected)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize(
    ("mask", "keep", "guard"),
    [(LEFT_PADDED, 1, LEFT), (LEFT_PADDED, 0, LEFT), (RIGHT_PADDED, 1, RIGHT), (RIGHT_PADDED, 2, RIGHT)],
)
def test_wrong_padding_is_refused(
    attention: ir.Model, run: Any, mask: list[list[int]], keep: int, guard: str, optimize: bool
) -> None:
    KeepLastLogitsPass()(attention)
    RefusePaddingPass()(attention)
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=guard):
        run(attention, _feeds(mask, keep), optimize=optimize)


@pytest.mark.parametrize("optimize", [False, True])
def test_right_padding_with_all_logits_is_right(attention: ir.Model, run: Any, optimize: bool) -> None:
    expected = run(attention, _feeds(FULL))[0]
    KeepLastLogitsPass()(attention)
    RefusePaddingPass()(attention)
    found = run(attention, _feeds(RIGHT_PADDED, 0), optimize=optimize)[0]
    np.testing.assert_allclose(found[0, :3], expected[0, :3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)


def test_without_the_pass_left_padding_is_silently_wrong(attention: ir.Model, run: Any) -> None:
    # The reason for the pass: drop this test, and the pass, when GroupQueryAttention reads the mask.
    alone = _feeds([[1, 1, 1], [1, 1, 1]])
    alone["input_ids"] = np.array([[2, 3, 4], [6, 7, 8]])
    expected = run(attention, alone)[0][1]
    found = run(attention, _feeds(LEFT_PADDED))[0][1, 1:]
    assert np.abs(found - expected).max() > 0.01


def test_only_the_left_guard_where_all_logits_are_kept(attention: ir.Model) -> None:
    RefusePaddingPass()(attention)
    names = [node.name for node in attention.graph]
    assert LEFT in names
    assert RIGHT not in names


def test_second_run_changes_nothing(attention: ir.Model) -> None:
    RefusePaddingPass()(attention)
    assert not RefusePaddingPass()(attention).modified


def test_graph_without_attention_is_left_alone(tiny: Any) -> None:
    assert not RefusePaddingPass()(tiny().model).modified


def test_missing_mask_is_an_error(attention: ir.Model) -> None:
    with pytest.raises(ValueError, match="no graph input mask"):
        RefusePaddingPass(mask="mask")(attention)
