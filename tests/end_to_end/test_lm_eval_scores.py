"""Scores equal those of lm-evaluation-harness: its own code on the float model, ours on the float export."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bdq_export.commands.export import export
from bdq_runtime.model import LanguageModel
from bdq_runtime.tasks import evaluate_task, load_rows
from bdq_runtime.tokenizer import TextTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("lm_eval")

TOLERANCE = 2e-3  # of log-likelihoods of up to 2000: float32 sums in another order

CHOICES = [
    ("Question: What does a baker bake?\nAnswer:", [" bread", " a letter to the mayor", " no", " crème brûlée 😀"]),
    ("The cat sat on the ", [" mat", " moon.", " m"]),
    ("", [" a text without context", " another", " x"]),
    ("Is the sea blue?\n", [" yes", " no, it is \u0444\u0438\u043e\u043b\u0435\u0442 today", " yes, and green"]),
    ("far too long for the model " * 12, [" end", " and so on", " ."]),
    ("Tea or coffee? I take", [" tea", " coffee", " both of them", " neither"]),
]
PARTIAL = [
    (["The cup fell off the table because the cup", "The cup fell off the table because the table"], " was tilted."),
    (["Ann thanked Bob, so Ann", "Ann thanked Bob, so Bob"], " smiled and left early."),
]
CONTEXTS = ["It rains, so take an", "abc", "1, 2, 3,", "Once upon a time", "zzz", "The end of the", "q", "Hello, my"]


@dataclass(frozen=True)
class Pair:
    """A float checkpoint and its float export."""

    checkpoint: Path
    exported: Path


@pytest.fixture(scope="module", params=["plain", "begins texts"])
def pair(request: pytest.FixtureRequest, write_model: Callable[..., Path], tmp_path_factory: Any) -> Pair:
    from tokenizers import AddedToken, Tokenizer, processors

    folder = tmp_path_factory.mktemp("float")
    model = write_model(folder / "model", "llama", num_hidden_layers=2)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<begin>", special=True), AddedToken("<end>", special=True)])
    begin, end = (tokenizer.token_to_id(token) for token in ("<begin>", "<end>"))
    if request.param != "plain":
        tokenizer.post_processor = processors.TemplateProcessing("<begin> $A", None, [("<begin>", begin)])
    tokenizer.save(str(model / "tokenizer.json"))
    special = {"bos_token": "<begin>", "eos_token": "<end>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(special))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "bos_token_id": begin, "eos_token_id": end}))
    export(model, folder / "exported", scheme="w16a16", transform="none", weights="rtn", min_top1=0.0, quiet=True)
    return Pair(model, folder / "exported")


@pytest.fixture(scope="module")
def theirs(pair: Pair) -> Any:
    """lm_eval's own model class on the checkpoint."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(pair.checkpoint), dtype="float32", device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def adapter(pair: Pair) -> Any:
    """Ours, on the export."""
    from bdq_export.lm_eval_adapter import BdqLM

    return BdqLM(str(pair.exported), threads=1)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def accuracy_of_theirs(model: Any, rows: Path, cache: Path, **task: Any) -> dict[str, Any]:
    """What `simple_evaluate` says of a task made of our rows."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(cache)}}
    config = {"task": "rows", **source, "test_split": "test", "metadata": {"version": 0}, **task}
    found = simple_evaluate(model, tasks=[config], task_manager=TaskManager(include_defaults=False), bootstrap_iters=10)
    assert found is not None
    result: dict[str, Any] = found["results"]["rows"]
    return result


def metrics(*names: str) -> list[dict[str, Any]]:
    return [{"metric": n, "aggregation": "perplexity" if n == "perplexity" else "mean"} for n in names]


def test_multiple_choice(pair: Pair, theirs: Any, tmp_path: Path) -> None:
    rows = [{"context": c, "choices": o, "gold": i % len(o)} for i, (c, o) in enumerate(CHOICES * 2)]
    file = write(tmp_path / "rows.jsonl", rows)
    expected = accuracy_of_theirs(
        *(theirs, file, tmp_path / "cache"),
        output_type="multiple_choice",
        doc_to_text=lambda row: row["context"],
        doc_to_choice=lambda row: [choice[1:] for choice in row["choices"]],
        doc_to_target=lambda row: row["gold"],
        metric_list=metrics("acc", "acc_norm"),
    )
    model, tokenizer = LanguageModel(pair.exported, threads=1), TextTokenizer(pair.exported)
    found = evaluate_task(model, tokenizer, load_rows(file), "rows")
    assert found.accuracy == pytest.approx(expected["acc,none"])
    assert found.accuracy_norm == pytest.approx(expected["acc_norm,none"])
    assert found.accuracy_stderr == pytest.approx(expected["acc_stderr,none"])
    assert 0 < found.accuracy < 1, "the rows tell models apart"


def test_last_word(pair: Pair, theirs: Any, tmp_path: Path) -> None:
    letters = string.digits + string.ascii_letters + string.punctuation
    file = write(tmp_path / "rows.jsonl", [{"context": c, "target": x} for c in CONTEXTS for x in letters])
    expected = accuracy_of_theirs(
        *(theirs, file, tmp_path / "cache"),
        output_type="loglikelihood",
        doc_to_text=lambda row: row["context"],
        doc_to_target=lambda row: row["target"],
        metric_list=metrics("acc", "perplexity"),
    )
    model, tokenizer = LanguageModel(pair.exported, threads=1), TextTokenizer(pair.exported)
    found = evaluate_task(model, tokenizer, load_rows(file), "rows")
    assert found.accuracy == pytest.approx(expected["acc,none"])
    assert found.accuracy > 0, "some letter is the likeliest"
    assert found.target_perplexity == pytest.approx(expected["perplexity,none"], rel=1e-4)


def test_partial_context(pair: Pair, theirs: Any, tmp_path: Path) -> None:
    rows = [{"contexts": c, "continuation": x, "gold": gold} for c, x in PARTIAL for gold in (0, 0, 1)]
    file = write(tmp_path / "rows.jsonl", rows)
    expected = accuracy_of_theirs(
        *(theirs, file, tmp_path / "cache"),
        output_type="multiple_choice",
        doc_to_text=lambda row: row["gold"],
        doc_to_choice=lambda row: row["contexts"],
        doc_to_target=lambda row: row["continuation"][1:],
        metric_list=metrics("acc"),
    )
    model, tokenizer = LanguageModel(pair.exported, threads=1), TextTokenizer(pair.exported)
    assert evaluate_task(model, tokenizer, load_rows(file), "rows").accuracy == pytest.approx(expected["acc,none"])


def instances(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=args, task_name="rows") for args in arguments]


def test_log_likelihoods(theirs: Any, adapter: Any) -> None:
    pairs = [(context, choice) for context, choices in CHOICES for choice in choices]
    pairs += [(context, continuation) for contexts, continuation in PARTIAL for context in contexts]
    pairs += [("<begin>a text that begins itself", " with it"), ("", "<begin>so"), ("white \n\t", " space ")]
    found = adapter.loglikelihood(instances(*pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(instances(*pairs), disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods(theirs: Any, adapter: Any) -> None:
    texts = [("A short text.",), ("A text that is longer than what the model reads at a time. " * 15,), ("é",)]
    found = adapter.loglikelihood_rolling(instances(*texts), disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(instances(*texts), disable_tqdm=True), abs=TOLERANCE)


def test_generated_texts(theirs: Any, adapter: Any) -> None:
    arguments = [(c, {"until": ["e", "\n"], "max_gen_toks": 24}) for c in CONTEXTS]
    arguments += [(c, {"max_gen_toks": 9, "do_sample": False}) for c in (CHOICES[4][0], "so")]
    found = adapter.generate_until(instances(*arguments), disable_tqdm=True)
    assert found == theirs.generate_until(instances(*arguments), disable_tqdm=True)
    assert len(set(found)) > 3
