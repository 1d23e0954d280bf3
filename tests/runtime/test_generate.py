"""Generation: greedy equals recomputing, sampling is seeded and follows the softmax, the end is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bdq_runtime.generate import generate_tokens, pick
from bdq_runtime.model import LanguageModel

PROMPT = [3, 17, 90, 41]


def test_greedy_equals_recomputing_each_step(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    found = list(generate_tokens(model, PROMPT, 24, stop=()))

    other = LanguageModel(tiny_decoder(), threads=1, share_cache=False)
    text = list(PROMPT)
    for _ in range(24):
        other.reset()
        text.append(int(other.append(text)[-1].argmax()))
    assert found == text[len(PROMPT) :]
    assert list(generate_tokens(model, PROMPT, 24, stop=())) == found, "a second run starts afresh"


def test_stops_before_the_end_token(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    every = list(generate_tokens(model, PROMPT, 24, stop=()))
    end = every[10]
    assert list(generate_tokens(model, PROMPT, 24, stop={end})) == every[: every.index(end)]
    assert model.folder.eos_ids() == {258}


def test_sampling_is_seeded(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    one, same, other = (list(generate_tokens(model, PROMPT, 16, 1.5, seed, stop=())) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_samples_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.0, 2.0, -np.inf], np.float32)
    random = np.random.default_rng(0)
    counts = np.bincount([pick(logits, 2.0, random) for _ in range(20000)], minlength=4)
    expected = np.exp(logits / 2.0) / np.exp(logits / 2.0).sum()
    np.testing.assert_allclose(counts / 20000, expected, atol=0.012)
    assert np.abs(counts / 20000 - np.exp(logits) / np.exp(logits).sum()).max() > 0.05, "control: temperature matters"
    assert pick(logits, 1e-30, random) == 2


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no tokens"),
        ([1], {"temperature": -1.0}, "temperature is -1"),
        ([1], {"temperature": float("nan")}, "temperature is nan"),
        ([1], {"max_new_tokens": 0}, "new tokens are 0"),
        ([1] * 256, {}, "256 tokens and the model's context 256"),
    ],
)
def test_refuses(tiny_decoder: Callable[..., Path], prompt: list[int], options: dict[str, float], message: str) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    with pytest.raises(ValueError, match=message):
        generate_tokens(model, prompt, **options)  # type: ignore[arg-type]


def test_never_goes_past_the_context(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    assert len(list(generate_tokens(model, [1] * 250, 100, stop=()))) == 6
