"""The check that every export makes: the float graph computes what torch computes.

The graph runs in ONNX Runtime without its weights being copied or written to a file: each large initializer becomes a
graph input, fed from the memory of the torch tensors (of lazy weights, from a temporary file: see
`bdq_passes.storage`). A weight `[K, N]` that is the transposed view of a torch weight
`[N, K]` is fed as it lies in memory, and its MatMul reads it transposed:

    MatMul(x, W)   W = view of V.T   ->   FusedMatMul(x, V, transB=1)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_export.errors import VerificationError
from bdq_models import Dimensions
from bdq_passes.storage import stored

if TYPE_CHECKING:
    import onnxruntime as ort
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Largest accepted difference of a logit, in standard deviations of the logits."""

PREFILL, DECODE_STEPS = 30, 8
LONGEST_WINDOW = 1024
"""Windows up to this are passed by the prefill; of longer ones only the attribute is compared."""

_FED_FROM = 1 << 16
"""Initializers of at least this many bytes are fed as inputs."""


def check_float_graph(
    model: ir.Model | Path, torch_model: PreTrainedModel, dimensions: Dimensions, seed: int = 0
) -> float:
    """Compare the logits of `model` with those of torch on random tokens: a prefill, then single tokens.

    The prefill is longer than the sliding window, if there is one of at most `LONGEST_WINDOW`. The last
    `PREFILL + DECODE_STEPS` positions are compared; each depends on all before it.

    Args:
        model: a graph in the normal form, or the path of its file.
        torch_model: the float model, sharing the weights; in eval mode.
        dimensions: sizes of the model.
        seed: of the tokens.

    Returns:
        max |Δlogit| / std(logit).

    Raises:
        VerificationError: the figure is above `TOLERANCE` or not finite, or an attention window is not the model's.
    """
    graph = ir.load(model) if isinstance(model, Path) else model
    _check_windows(graph, torch_model)
    window = dimensions.sliding_window or 0
    prefill = max(PREFILL, window + 8 if window <= LONGEST_WINDOW else 0)
    prefill = min(prefill, dimensions.context_length - DECODE_STEPS)
    compared = min(PREFILL, prefill) + DECODE_STEPS
    tokens = np.random.default_rng(seed).integers(0, dimensions.vocab_size, (1, prefill + DECODE_STEPS))
    expected = _torch_logits(torch_model, tokens, compared)
    found = _graph_logits(graph, tokens, prefill, compared)
    error = float(np.abs(found - expected).max() / expected.std())
    if not error <= TOLERANCE:
        raise VerificationError(
            f"the float graph differs from torch: logits are off by {error:.3g} of their standard deviation, "
            f"expected at most {TOLERANCE:g}; this model cannot be exported, please report it"
        )
    return error


def _check_windows(graph: ir.Model, torch_model: PreTrainedModel) -> None:
    from bdq_export.builders.layer_kinds import windows
    from bdq_export.builders.normalize.frame import attention_nodes, layer_of

    expected = windows(torch_model.config)
    found = {layer_of(node): node.attributes.get_int("local_window_size", -1) for node in attention_nodes(graph)}
    for layer, window in enumerate(expected):
        if found.get(layer) != window:
            raise VerificationError(
                f"layer {layer} of the float graph attends to {found.get(layer)} tokens, expected {window} (-1: all)"
            )


def _torch_logits(torch_model: PreTrainedModel, tokens: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.float32]:
    """Logits of the last `count` positions, `[1, count, vocabulary]`."""
    import torch

    with torch.inference_mode():
        result = torch_model(torch.from_numpy(tokens), use_cache=False, logits_to_keep=count)
    logits: npt.NDArray[np.float32] = result.logits.float().numpy()
    return logits


def _graph_logits(graph: ir.Model, tokens: npt.NDArray[np.int64], prefill: int, count: int) -> npt.NDArray[np.float32]:
    """Logits of the last `count` positions: one prefill, then one run for each further token."""
    import onnxruntime as ort

    steps = tokens.shape[1] - prefill
    copy = _keep_last(graph.clone(), count - steps)
    weights = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in _feed_weights(copy).items()}
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(copy).SerializeToString(), options, providers=["CPUExecutionProvider"])
    cache = _empty_cache(session)
    logits = []
    for start, end in [(0, prefill), *((position, position + 1) for position in range(prefill, tokens.shape[1]))]:
        result, cache = _run(session, weights, cache, tokens[:, start:end], end)
        logits.append(result)
    return np.concatenate(logits, axis=1)


def _empty_cache(session: ort.InferenceSession) -> dict[str, ort.OrtValue]:
    import onnxruntime as ort

    shapes = {value.name: value.shape for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    return {
        name: ort.OrtValue.ortvalue_from_numpy(np.zeros((1, shape[1], 0, shape[3]), np.float32))
        for name, shape in shapes.items()
    }


def _run(
    session: ort.InferenceSession,
    weights: dict[str, ort.OrtValue],
    cache: dict[str, ort.OrtValue],
    tokens: npt.NDArray[np.int64],
    total: int,
) -> tuple[npt.NDArray[np.float32], dict[str, ort.OrtValue]]:
    import onnxruntime as ort

    feeds = {
        "input_ids": ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tokens)),
        "attention_mask": ort.OrtValue.ortvalue_from_numpy(np.ones((1, total), np.int64)),
    }
    names = [value.name for value in session.get_outputs()]
    results = dict(zip(names, session.run_with_ort_values(names, {**feeds, **weights, **cache}), strict=True))
    logits: npt.NDArray[np.float32] = results.pop("logits").numpy()
    return logits, {name.replace("present.", "past_key_values."): value for name, value in results.items()}


def _keep_last(graph: ir.Model, count: int) -> ir.Model:
    """Slice the input of lm_head to the last `count` positions: full logits of a long prefill would be huge."""
    from bdq_export.builders.graph import constant

    head = next(node for node in graph.graph if node.name == "lm_head")
    bounds = [
        constant(graph, f"check.{name}", np.array([value], np.int64))
        for name, value in (("start", -count), ("end", np.iinfo(np.int64).max), ("axis", 1))
    ]
    last = ir.node("Slice", [head.inputs[0], *bounds], name="check.last")
    last.outputs[0].name = "check.last"
    graph.graph.insert_before(head, last)
    head.replace_input_with(0, last.outputs[0])
    return graph


def _feed_weights(graph: ir.Model) -> dict[str, npt.NDArray[Any]]:
    """Make each large initializer a graph input; returns what to feed."""
    arrays = {}
    for name, value in list(graph.graph.initializers.items()):
        tensor = value.const_value
        assert tensor is not None, "every initializer of a finished graph has a value"
        array = tensor.numpy()
        if tensor.nbytes < _FED_FROM or array.ndim != 2:
            # The model is handed over as bytes: nothing in it may point to a file.
            value.const_value = ir.Tensor(array, name=name)
            continue
        if not array.flags.c_contiguous and array.flags.f_contiguous and _read_transposed(value):
            array = array.T
        arrays[name] = stored(np.ascontiguousarray(array))
        del graph.graph.initializers[name]
        value.const_value = None
        value.shape = ir.Shape(array.shape)
        graph.graph.inputs.append(value)
    return arrays


def _read_transposed(value: ir.Value) -> bool:
    """Let the MatMuls that read `value` take its transpose; False, and nothing done, if anything else reads it."""
    users = value.uses()
    if any(user.op_type != "MatMul" or index != 1 for user, index in users):
        return False
    for node, _ in users:
        graph = node.graph
        assert graph is not None, "the node is in a graph"
        fused = ir.node("FusedMatMul", node.inputs, {"transB": 1}, domain="com.microsoft", name=node.name)
        fused.outputs[0].name = f"{node.name}.transposed"
        graph.insert_before(node, fused)
        output = node.outputs[0]
        name = output.name
        output.replace_all_uses_with(fused.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
        output.name, fused.outputs[0].name = None, name
    return True
