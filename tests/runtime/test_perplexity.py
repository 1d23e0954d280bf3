"""Perplexity, KL and top-1 agreement against their definitions in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bdq_runtime import perplexity
from bdq_runtime.model import LanguageModel
from bdq_runtime.perplexity import measure_perplexity, windows_of

TOKENS = np.random.default_rng(5).integers(0, 264, 300)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64))
    return weights / weights.sum(-1, keepdims=True)


def window_logits(model: LanguageModel, window: np.ndarray) -> np.ndarray:
    model.reset()
    return model.append(window, all_logits=True).copy()


@pytest.mark.parametrize("piece", [None, 64])
def test_equals_the_formula(
    tiny_decoder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, piece: int | None
) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    if piece is not None:  # logits of a window in several pieces
        monkeypatch.setattr(perplexity, "_LOGITS_BYTES", 4 * 264 * piece)
    windows = windows_of(TOKENS, 100)
    noise = np.random.default_rng(1).standard_normal((100, 264))

    def reference(window: np.ndarray) -> np.ndarray:
        return window_logits(other, window) + noise

    other = LanguageModel(tiny_decoder(), threads=1)
    found = measure_perplexity(model, windows, reference)

    likelihoods, theirs, kl, same = [], [], [], []
    for window in windows:
        q, p = softmax(window_logits(model, window)[:-1]), softmax(reference(window)[:-1])
        rows = np.arange(99)
        likelihoods.append(np.log(q[rows, window[1:]]))
        theirs.append(np.log(p[rows, window[1:]]))
        kl.append((p * np.log(p / q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert (found.windows, found.seq_len, found.scored_tokens) == (3, 100, 297)
    assert found.perplexity == pytest.approx(np.exp(-np.mean(likelihoods)), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(np.exp(-np.mean(theirs)), rel=1e-4)
    assert found.kl_divergence == pytest.approx(np.mean(kl), rel=1e-4)
    assert found.top1_agreement == pytest.approx(np.mean(same))
    assert 0.05 < found.top1_agreement < 0.95, "the noise makes them differ"


def test_a_model_agrees_with_itself(tiny_decoder: Callable[..., Path]) -> None:
    model, other = (LanguageModel(tiny_decoder(), threads=1) for _ in range(2))
    windows = windows_of(TOKENS, 50, max_windows=2)
    found = measure_perplexity(model, windows, lambda window: window_logits(other, window))
    assert found.windows == 2
    assert found.reference_perplexity == pytest.approx(found.perplexity, rel=1e-6)
    assert found.kl_divergence == pytest.approx(0, abs=1e-7)
    assert found.top1_agreement == 1.0


def test_windows_do_not_see_each_other(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    both = measure_perplexity(model, windows_of(TOKENS, 50, 2))
    one, two = (measure_perplexity(model, windows_of(TOKENS[i : i + 50], 50)) for i in (0, 50))
    assert np.log(both.perplexity) == pytest.approx((np.log(one.perplexity) + np.log(two.perplexity)) / 2, rel=1e-6)
    whole = measure_perplexity(model, windows_of(TOKENS[:100], 100))
    assert abs(whole.perplexity / both.perplexity - 1) > 1e-3, "control: a longer window gives another figure"


def test_windows_are_cut() -> None:
    tokens = list(range(10, 21))
    assert windows_of(tokens, 4).tolist() == [[10, 11, 12, 13], [14, 15, 16, 17]]
    assert windows_of(tokens, 4, beginning=[1]).tolist() == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18]]
    assert windows_of(tokens, 4, max_windows=1).shape == (1, 4)
    with pytest.raises(ValueError, match="11 tokens, less than one window of 12"):
        windows_of(tokens, 12)
    with pytest.raises(ValueError, match="sequence length is 1"):
        windows_of(tokens, 1)
    with pytest.raises(ValueError, match="limited to 0"):
        windows_of(tokens, 4, max_windows=0)


def test_refuses_another_vocabulary(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    with pytest.raises(ValueError, match=r"reference logits are \(50, 9\), expected \(50, 264\)"):
        measure_perplexity(model, windows_of(TOKENS, 50), lambda window: np.zeros((50, 9), np.float32))
