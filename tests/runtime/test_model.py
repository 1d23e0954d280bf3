"""The KV cache loop: whatever way the tokens come in, the logits are those of one full run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bdq_runtime.model import LanguageModel
from bdq_runtime.session import create_session

TOKENS = np.random.default_rng(3).integers(0, 264, 90)
TOLERANCE = 2e-4  # logits have a standard deviation of 3; chunks are summed in another order
VARIANTS = [
    {},
    {"keep": False},
    {"positions": True},
    {"window": 8},
    {"attention": "concat", "rotary": False},
    {"attention": "concat", "rotary": False, "keep": False, "positions": True},
]


def full_logits(folder: Path, tokens: np.ndarray, keep: bool, positions: bool) -> np.ndarray:
    """All logits by one plain `session.run` with an empty cache: no code of the loop is used."""
    session = create_session(folder / "model.onnx", threads=1)
    feed = {"input_ids": tokens[None], "attention_mask": np.ones((1, len(tokens)), np.int64)}
    if keep:
        feed["logits_to_keep"] = np.array(0, np.int64)
    if positions:
        feed["position_ids"] = np.arange(len(tokens))[None]
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feed[node.name] = np.zeros((1, node.shape[1], 0, node.shape[3]), np.float32)
    return session.run(["logits"], feed)[0][0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("share", [None, False])
def test_cached_logits_equal_full_recompute(
    tiny_decoder: Callable[..., Path], variant: dict[str, object], share: bool | None
) -> None:
    folder = tiny_decoder(**variant)
    full = full_logits(folder, TOKENS, bool(variant.get("keep", True)), bool(variant.get("positions")))
    model = LanguageModel(folder, threads=1, share_cache=share)
    assert model.shares_cache == (share is None and variant.get("attention", "gqa") == "gqa")

    rows = [model.append(TOKENS[:20], all_logits=True).copy()]
    rows += [model.append([int(token)]).copy() for token in TOKENS[20:40]]
    rows.append(model.append(TOKENS[40:], all_logits=True).copy())  # past the first capacity, and a chunk after a step

    assert model.length == len(TOKENS)
    np.testing.assert_allclose(np.concatenate(rows), full, atol=TOLERANCE)
    # Negative control: the comparison sees one wrong token in the cache.
    model.reset()
    model.append([*TOKENS[:18], (int(TOKENS[18]) + 1) % 264, TOKENS[19]])
    assert np.abs(model.append([int(TOKENS[20])])[0] - full[20]).max() > 1e-2


def test_gqa_and_plain_attention_agree(tiny_decoder: Callable[..., Path]) -> None:
    fused = LanguageModel(tiny_decoder(rotary=False), threads=1)
    plain = LanguageModel(tiny_decoder(attention="concat", rotary=False), threads=1)
    assert (fused.shares_cache, plain.shares_cache) == (True, False)
    for part in (TOKENS[:30], TOKENS[30:31], TOKENS[31:50]):
        np.testing.assert_allclose(fused.append(part, True), plain.append(part, True), atol=TOLERANCE)


def test_only_the_last_position_comes_back(tiny_decoder: Callable[..., Path]) -> None:
    for keep in (True, False):
        model = LanguageModel(tiny_decoder(keep=keep), threads=1)
        last = model.append(TOKENS[:10]).copy()
        assert last.shape == (1, 264)
        model.reset()
        np.testing.assert_allclose(last, model.append(TOKENS[:10], all_logits=True)[-1:], atol=1e-5)


@pytest.mark.parametrize("last", [0, 4])
def test_as_many_logits_as_tokens_at_most(tiny_decoder: Callable[..., Path], last: int) -> None:
    with pytest.raises(ValueError, match=f"last {last} of 3 tokens"):
        LanguageModel(tiny_decoder()).append([1, 2, 3], last=last)


@pytest.mark.parametrize("share", [None, False])
def test_truncate_forgets_what_came_after(tiny_decoder: Callable[..., Path], share: bool | None) -> None:
    model = LanguageModel(tiny_decoder(), threads=1, share_cache=share)
    model.append(TOKENS[:10])
    expected = model.append(TOKENS[10:14], all_logits=True).copy()
    model.truncate(10)
    model.append([5, 6, 7, 8, 9, 10])
    model.truncate(10)
    assert np.array_equal(model.append(TOKENS[10:14], all_logits=True), expected)
    with pytest.raises(ValueError, match="cannot keep 15 tokens of 14"):
        model.truncate(15)


def test_steps_copy_nothing(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    model.reset(80)
    model.append(TOKENS[:10])
    inputs = dict(vars(model._cache)["_buffers"])
    for token in TOKENS[10:30]:
        model.append([int(token)])
    assert all(vars(model._cache)["_buffers"][name] is buffer for name, buffer in inputs.items())
    keys = inputs["past_key_values.0.key"]
    assert np.abs(keys[:, :, 29]).sum() > 0, "the step wrote into the buffer that was bound as its past"
    assert not keys[:, :, 30:].any()


@pytest.mark.parametrize(
    ("tokens", "message"), [([], "at least one"), ([264], "token 264 is not one"), ([-1, 3], "token -1")]
)
def test_refuses_tokens_that_cannot_be(tiny_decoder: Callable[..., Path], tokens: list[int], message: str) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    with pytest.raises(ValueError, match=message):
        model.append(tokens)
    assert model.length == 0
