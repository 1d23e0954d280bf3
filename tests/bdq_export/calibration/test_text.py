"""Calibration text: seeded sampling from the model, and files that are refused or cut."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bdq_export.calibration import text
from bdq_export.calibration.kv_cache import preallocated_cache
from bdq_export.calibration.openings import FREE, Openings
from bdq_export.errors import InvalidInputError
from bdq_export.float_model import load_float_model
from bdq_export.progress import QuietProgress
from bdq_runtime.tokenizer import TextTokenizer

WORDS = [f"w{index}" for index in range(50)]


@dataclass(frozen=True)
class Folder:
    directory: Path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    vocabulary = {word: index for index, word in enumerate(["[UNK]", *WORDS])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return Folder(tmp_path)


def _tokens(folder: Folder, data: bytes, samples: int = 4, seq_len: int = 32, seed: int = 0) -> torch.Tensor:
    path = folder.directory / "calib.txt"
    path.write_bytes(data)
    return text.calibration_tokens(folder, None, path, samples, seq_len, seed, QuietProgress())  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
def test_sampling_is_seeded(family, tiny_model):
    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    first, again, other = (text.sample_tokens(model, 5, 40, seed, QuietProgress()) for seed in (0, 0, 1))
    assert first.shape == (5, 40)
    assert first.dtype == torch.int64
    assert int(first.max()) < tiny.dimensions.vocab_size
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert model.dtype == torch.float32


def test_sampled_text_is_likely_for_the_model(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    tokens = text.sample_tokens(model, 8, 32, 0, QuietProgress())

    def loss(ids):
        with torch.no_grad():
            logits = model(ids).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    shuffled = tokens[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    assert loss(tokens) < loss(shuffled) - 0.5


def test_passages_make_up_long_sequences(tiny_model, monkeypatch):
    monkeypatch.setattr(text, "PASSAGE", 16)
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    tokens = text.sample_tokens(model, 3, 40, 0, QuietProgress(), Openings(beginning=(7,)))
    assert tokens.shape == (3, 40)
    assert tokens[:, [0, 14, 28]].eq(7).all()  # 3 passages of 14 tokens, each with its own beginning


def test_openings_are_those_of_the_model():
    openings = Openings(beginning=(2,), chat=(2, 5, 6), special=frozenset(range(4)))
    fixed = openings.draw(40, 8, 10, torch.Generator().manual_seed(0))
    assert fixed.shape == (40, 8)
    assert fixed[::2, :3].eq(torch.tensor([2, 5, 6])).all()
    assert fixed[1::2, 0].eq(2).all()
    assert set(fixed[1::2, 1].tolist()) == set(range(4, 10))  # every word, and nothing special
    assert fixed[::2, 3:].eq(FREE).all()
    assert fixed[1::2, 2:].eq(FREE).all()
    assert openings.draw(2, 4, 10, torch.Generator())[0].tolist() == [2, FREE, FREE, FREE]  # too short to converse
    assert Openings().draw(9, 4, 10, torch.Generator())[:, 0].ne(FREE).all()


def test_a_text_begins_anew_after_its_end(tiny_model):
    tiny = tiny_model("llama")
    model = load_float_model(tiny, tiny.weights)
    model.config.eos_token_id = [2, 3]
    tokens = text.sample_tokens(model, 8, 60, 0, QuietProgress(), Openings(beginning=(7,)))
    ends = torch.isin(tokens[:, :-1], torch.tensor([2, 3]))
    assert ends.any()
    assert tokens[:, 1:][ends].eq(7).all()


def test_openings_are_read_from_the_folder(folder):
    assert Openings.of(folder.directory) == Openings()
    path = folder.directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"] = [
        {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False} for i, name in ((51, "<s>"), (52, "<user>"))
    ]  # fmt: skip
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [51], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(tokenizer))
    template = folder.directory / "chat_template.jinja"
    # What the two conversations say is unknown to this vocabulary, hence the same token: it counts as opening.
    template.write_text("<s> {% for m in messages %}<user> {{ m.content }}{% endfor %}")
    assert Openings.of(folder.directory).chat[:2] == (51, 52)
    assert Openings.of(folder.directory).beginning == (51,)
    assert Openings.of(folder.directory).special == {51, 52}
    template.write_text("<s> {{ strftime_now('%d') }} <user>")
    assert Openings.of(folder.directory).chat == ()


def test_windows_of_a_file_begin_like_every_text(folder, monkeypatch):
    monkeypatch.setattr(TextTokenizer, "beginning", lambda self: [0, 0])
    tokens = _tokens(folder, b"w1 w2 w3 w4 w5 " * 100)
    assert tokens.shape == (4, 32)
    assert tokens[:, :2].eq(0).all()
    assert tokens[:, 2:].ne(0).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_preallocated_cache_changes_nothing(family, tiny_model):
    from transformers.cache_utils import DynamicCache

    tiny = tiny_model(family)
    model = load_float_model(tiny, tiny.weights)
    ids = torch.arange(3, 43).reshape(2, 20)
    results = []
    for cache in (preallocated_cache(model.config, 20), DynamicCache(config=model.config)):
        with torch.no_grad():
            results.append([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_windows_of_a_file_do_not_overlap_and_follow_the_seed(folder):
    words = [WORDS[index * 7 % 50] for index in range(400)]
    data = " ".join(words).encode()
    first, again, other = (_tokens(folder, data, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (4, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    stream = torch.tensor([WORDS.index(word) + 1 for word in words])
    places = [next(i for i in range(0, 384, 32) if torch.equal(stream[i : i + 32], row)) for row in first]
    assert len(set(places)) == 4


def test_a_short_file_gives_fewer_sequences_and_says_so(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert _tokens(folder, b"w1 w2 " * 40).shape == (2, 32)
    assert "2 of 4" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"w1 \0 w2", "binary"),
        (b"w1 w2 \xff\xfe", "not UTF-8 at byte 6"),
        (b"w1 w2 w3", "has 3 tokens, expected at least 64"),
    ],
)
def test_bad_files_are_refused_in_one_line(folder, data, message):
    with pytest.raises(InvalidInputError, match=message) as caught:
        _tokens(folder, data)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(folder):
    for path in (folder.directory / "absent.txt", folder.directory):
        with pytest.raises(InvalidInputError, match="calibration file"):
            text.calibration_tokens(folder, None, path, 2, 32, 0, QuietProgress())


def test_only_the_beginning_of_a_huge_file_is_read(folder, monkeypatch):
    monkeypatch.setattr(text, "MAX_TEXT_BYTES", 10)
    path = folder.directory / "calib.txt"
    path.write_bytes("abcdefghié more".encode())
    assert text.read_text(path) == "abcdefghi"  # the cut is in the middle of a character
