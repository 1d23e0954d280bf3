"""What a model writes, greedily, behind a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bdq_runtime.model import LanguageModel

PROMPT = list(range(40, 56))


def answer(model: LanguageModel, count: int = 8) -> list[int]:
    """What `model`, in whose cache there is nothing, writes behind `PROMPT`."""
    tokens = []
    logits = model.append(PROMPT)
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits = model.append(tokens[-1:])
    return tokens


def genai_answer(folder: Path, count: int = 8) -> list[int]:
    """What onnxruntime-genai writes behind `PROMPT`; skips the test where that is not installed."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(PROMPT) + count, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([PROMPT], np.int32))
    tokens = []
    while not generator.is_done() and len(tokens) < count:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens
