"""SmolLM2-135M-Instruct: fetched, exported, opened in both runtimes."""

from __future__ import annotations

from pathlib import Path

import pytest

from bdq_export import evaluate, export, fetch, run

pytestmark = pytest.mark.slow

QUESTION = "What is the capital of France?"
TEXT = (
    "The quick brown fox jumps over the lazy dog. Water boils at 100 degrees Celsius at sea level, and freezes at 0. "
    "In 1969 two people walked on the Moon for the first time; they came back with 21.5 kg of rock and dust. "
) * 12


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch("smollm2-135m", tmp_path_factory.mktemp("fetched") / "smollm2-135m")


@pytest.fixture(scope="module")
def exported(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "w8a16"
    export(model_dir, out, scheme="w8a16", transform="bdq", weights="rtn", calib_samples=8, calib_seq_len=256)
    return out


def test_the_float_graph_has_the_perplexity_of_torch(model_dir: Path, tmp_path: Path) -> None:
    export(model_dir, tmp_path / "float", scheme="w16a16", transform="none", weights="rtn")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = evaluate(tmp_path / "float", text=text, seq_len=256, reference=model_dir).perplexity
    assert result is not None
    assert result.perplexity == pytest.approx(result.reference_perplexity, rel=1e-4)
    assert result.kl_divergence == pytest.approx(0, abs=1e-6)


def test_the_answer_names_paris(exported: Path) -> None:
    assert "Paris" in run(exported, prompt=QUESTION, chat=True, max_new_tokens=24).text


def test_genai_opens_the_folder_and_writes_the_same_tokens(exported: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(exported))
    tokenizer = genai.Tokenizer(model)
    parameters = genai.GeneratorParams(model)
    prompt = tokenizer.encode(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    parameters.set_search_options(max_length=len(prompt) + 24, do_sample=False)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))

    from bdq_runtime.generate import generate_tokens
    from bdq_runtime.model import LanguageModel

    ours = LanguageModel(exported)
    expected = list(generate_tokens(ours, [int(token) for token in prompt], max_new_tokens=24, stop=(2,)))
    assert [token for token in found if token != 2] == [token for token in expected if token != 2]
