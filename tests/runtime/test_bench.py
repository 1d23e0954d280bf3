"""Speed figures are of the steps that were asked for; public names are lazy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bdq_runtime
from bdq_runtime.bench import measure_speed, peak_rss_bytes, time_round
from bdq_runtime.model import LanguageModel


def test_measures(tiny_decoder: Callable[..., Path]) -> None:
    found = measure_speed(tiny_decoder(), prompt_tokens=20, new_tokens=5, threads=1, repeats=2)
    assert (found.prompt_tokens, found.new_tokens, found.threads) == (20, 5, 1)
    assert found.prefill_tokens_per_second == pytest.approx(20 / found.time_to_first_token_seconds)
    assert found.decode_tokens_per_second > 1
    assert found.load_seconds > 0
    assert found.peak_rss_bytes is None or found.peak_rss_bytes > 10e6
    assert (found.shares_cache, found.provider) == (True, "CPUExecutionProvider")


def test_round_feeds_what_it_says(tiny_decoder: Callable[..., Path]) -> None:
    model = LanguageModel(tiny_decoder(), threads=1)
    prefill, steps = time_round(model, range(10), 7)
    assert prefill > 0
    assert len(steps) == 7
    assert model.length == 10 + 7 + 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt tokens are 0"),
        ({"new_tokens": 0}, "new tokens are 0"),
        ({"prompt_tokens": 250, "new_tokens": 20}, "the model's context is 256"),
    ],
)
def test_refuses(tiny_decoder: Callable[..., Path], options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_speed(tiny_decoder(), **options)


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say")
def test_peak_memory_grows() -> None:
    before = peak_rss_bytes() or 0
    block = bytearray(before // 2 + 200_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert (peak_rss_bytes() or 0) > before


def test_public_names_exist_and_are_lazy() -> None:
    for name in bdq_runtime.__all__:
        assert getattr(bdq_runtime, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = bdq_runtime.nothing
    code = "import sys, bdq_runtime; assert 'onnxruntime' not in sys.modules; bdq_runtime.LanguageModel; "
    code += "assert 'onnxruntime' in sys.modules and not {'torch', 'onnx', 'jinja2', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
