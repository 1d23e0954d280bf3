"""Speed and memory of a model: prefill, decode, load, peak resident set."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.model import LanguageModel

_WARM_UP_STEPS = 4


@dataclass(frozen=True)
class SpeedResult:
    """What `measure_speed` found.

    Attributes:
        prompt_tokens: tokens of the prompt.
        new_tokens: decode steps timed.
        threads: as asked; None is one for each core.
        load_seconds: opening the session.
        prefill_tokens_per_second: median over the repeats.
        decode_tokens_per_second: of the median step.
        time_to_first_token_seconds: median prefill.
        peak_rss_bytes: largest resident set of the process so far; None where the system does not say.
        shares_cache: whether the KV cache is written in place.
        provider: the execution provider.
    """

    prompt_tokens: int
    new_tokens: int
    threads: int | None
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    peak_rss_bytes: int | None
    shares_cache: bool
    provider: str


def measure_speed(
    path: str | Path, prompt_tokens: int = 512, new_tokens: int = 64, threads: int | None = None, repeats: int = 3
) -> SpeedResult:
    """Load `path` and time it on random tokens, greedily continued.

    Raises:
        FileNotFoundError: no such model.
        ValueError: counts below 1, more tokens than the model's context, or a file ONNX Runtime cannot open.
    """
    for name, value in (("prompt tokens", prompt_tokens), ("new tokens", new_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} are {value}, expected at least 1")
    start = time.perf_counter()
    model = LanguageModel(path, threads=threads)
    load = time.perf_counter() - start
    total = prompt_tokens + new_tokens + _WARM_UP_STEPS
    if model.context_length is not None and total > model.context_length:
        raise ValueError(f"{total} tokens are asked for, the model's context is {model.context_length}; ask for fewer")
    prompt = np.random.default_rng(0).integers(0, model.vocab_size, prompt_tokens)
    # Memory is reserved and the thread pool is awake afterwards.
    time_round(model, prompt, min(new_tokens, _WARM_UP_STEPS))
    model.settle()
    rounds = [time_round(model, prompt, new_tokens if i == repeats else 1) for i in range(1, repeats + 1)]
    prefill = statistics.median(seconds for seconds, _ in rounds)
    return SpeedResult(
        prompt_tokens,
        new_tokens,
        threads,
        load,
        prefill_tokens_per_second=prompt_tokens / prefill,
        decode_tokens_per_second=1 / statistics.median(rounds[-1][1]),
        time_to_first_token_seconds=prefill,
        peak_rss_bytes=peak_rss_bytes(),
        shares_cache=model.shares_cache,
        provider=model.session.get_providers()[0],
    )


def time_round(
    model: LanguageModel, prompt: Sequence[int] | npt.NDArray[Any], new_tokens: int
) -> tuple[float, list[float]]:
    """Seconds of one prefill, and of each greedy decode step after a short warm-up."""
    model.reset(len(prompt) + new_tokens + _WARM_UP_STEPS)
    start = time.perf_counter()
    token = int(model.append(prompt)[-1].argmax())
    prefill = time.perf_counter() - start
    steps = []
    for _ in range(new_tokens + _WARM_UP_STEPS):
        start = time.perf_counter()
        token = int(model.append((token,))[-1].argmax())
        steps.append(time.perf_counter() - start)
    return prefill, steps[_WARM_UP_STEPS:]


def peak_rss_bytes() -> int | None:
    """The largest resident set of this process so far, None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
