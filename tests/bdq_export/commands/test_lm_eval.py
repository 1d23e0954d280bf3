"""The model `bdq` of lm-evaluation-harness, called as the harness calls it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bdq_export.cli import main
from bdq_export.commands import lm_eval as command
from bdq_export.errors import MissingDependencyError
from bdq_runtime.generate import generate_tokens
from bdq_runtime.model import LanguageModel
from bdq_runtime.tokenizer import TextTokenizer

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
BEGIN = 259


@pytest.fixture(scope="module")
def folder(tiny_decoder: Callable[..., Path]) -> Path:
    return tiny_decoder(begin=True)


@pytest.fixture(scope="module")
def adapter(folder: Path) -> Any:
    pytest.importorskip("lm_eval")
    from bdq_export.lm_eval_adapter import BdqLM

    return BdqLM(str(folder), threads=1, batch_size=1, device="cuda:0", max_gen_toks=5)


def requests(*arguments: tuple[Any, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=arguments_of_one) for arguments_of_one in arguments]


def by_hand(folder: Path, tokens: list[int], count: int) -> float:
    """Log-likelihood of the last `count` of `tokens`."""
    logits = LanguageModel(folder, threads=1).append(tokens[:-1], all_logits=True)[-count:].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(scores[np.arange(count), tokens[-count:]].sum())


def test_log_likelihoods(adapter: Any, folder: Path) -> None:
    encode = TextTokenizer(folder).encode
    found = adapter.loglikelihood(requests(("so ", "then"), ("", "ab"), ("<begin>so", "!")), disable_tqdm=True)
    assert found[0][0] == pytest.approx(by_hand(folder, [BEGIN, *encode("so then")], len(encode(" then"))), abs=1e-3)
    assert found[1][0] == pytest.approx(by_hand(folder, [BEGIN, *encode("ab")], 2), abs=1e-3)
    assert found[2][0] == pytest.approx(by_hand(folder, [BEGIN, *encode("so!")], 1), abs=1e-3)
    assert all(type(total) is float and type(greedy) is bool for total, greedy in found)


def test_rolling_log_likelihood_scores_each_token_once(adapter: Any, folder: Path) -> None:
    text = "a long text, " * 40
    tokens = TextTokenizer(folder).encode(text, begin=True)
    assert 256 < len(tokens) < 2 * 256
    # The prefix and the first 255 tokens predict 256 of them; the rest is predicted from a full window.
    rest = len(tokens) - 256
    expected = by_hand(folder, [BEGIN, *tokens[:256]], 256) + by_hand(folder, tokens[-257:], rest)
    found = adapter.loglikelihood_rolling(requests((text,), ("x",)), disable_tqdm=True)
    assert found[0] == pytest.approx(expected, abs=5e-2)
    assert found[1] == pytest.approx(
        by_hand(folder, [BEGIN, *TextTokenizer(folder).encode("x", begin=True)], 2), abs=1e-3
    )


def test_generates_up_to_a_stop_text(adapter: Any, folder: Path) -> None:
    tokenizer, model = TextTokenizer(folder), LanguageModel(folder, threads=1)
    contexts = ["once upon", "once upon a time", "zz"]

    def greedy(ids: list[int], count: int) -> str:
        return tokenizer.decode(list(generate_tokens(model, ids, count, stop=(258,))))

    whole = [greedy(tokenizer.encode(context, begin=True), 12) for context in contexts]
    found = adapter.generate_until(requests(*((c, {"max_gen_toks": 12}) for c in contexts)), disable_tqdm=True)
    assert found == whole
    (default,) = adapter.generate_until(requests(("zz", {})), disable_tqdm=True)
    assert default == greedy(tokenizer.encode("zz", begin=True), 5)
    stop = whole[0][2:4]
    (cut,) = adapter.generate_until(requests((contexts[0], {"until": [stop], "max_gen_toks": 12})), disable_tqdm=True)
    assert cut == whole[0].split(stop)[0]
    # 256 positions: the end of a longer prompt is kept, and the answer has room.
    (long,) = adapter.generate_until(requests(("b" * 300, {"max_gen_toks": 12})), disable_tqdm=True)
    ids = [BEGIN, *tokenizer.encode("b" * 300)][-(256 - 12) :]
    assert long == greedy(ids, 12)


def test_generation_arguments(adapter: Any) -> None:
    sampled = requests(("once", {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "max_gen_toks": 20}))
    assert adapter.generate_until(sampled, True) != adapter.generate_until(sampled, True), "repeats differ"
    greedy = requests(("once", {"do_sample": False, "top_p": 0.5, "max_gen_toks": 3}))
    assert adapter.generate_until(greedy, True) == adapter.generate_until(greedy, True)
    cold = requests(("once", {"do_sample": False, "temperature": 9.0, "max_gen_toks": 3}))
    assert adapter.generate_until(cold, True) == adapter.generate_until(greedy, True)
    with pytest.raises(ValueError, match=r"generation argument top_p is 0\.5"):
        adapter.generate_until(requests(("a", {"do_sample": True, "temperature": 1.0, "top_p": 0.5})), True)
    with pytest.raises(ValueError, match="300 tokens are to be generated and a text has at most 256"):
        adapter.generate_until(requests(("a", {"max_gen_toks": 300})), True)


def test_chat(adapter: Any, folder: Path, tmp_path: Path) -> None:
    history = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    assert adapter.apply_chat_template(history) == "<system>be<user>hi>"
    unfinished = [*history, {"role": "assistant", "content": "so "}]
    assert adapter.apply_chat_template(unfinished, add_generation_prompt=False) == "<system>be<user>hi<assistant>so "
    assert adapter.chat_template(False) is None
    assert adapter.chat_template(True) == (folder / "chat_template.jinja").read_text()
    with pytest.raises(ValueError, match="no chat template 'tools', expected one of default"):
        adapter.chat_template("tools")
    # A template that knows no system role.
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    (tmp_path / "chat_template.jinja").write_text(refusing)
    other = type(adapter)(str(tmp_path), threads=1)
    assert other.apply_chat_template(history) == "hi"


def test_batch_size(folder: Path) -> None:
    pytest.importorskip("lm_eval")
    from bdq_export.lm_eval_adapter import BdqLM

    def size(**arguments: Any) -> int:
        return int(BdqLM(str(folder), threads=1, **arguments).batch_size)

    assert [size(), size(batch_size="auto"), size(batch_size=1), size(batch_size="4")] == [16, 16, 16, 4]
    assert size(max_batch_size=1) == 1
    with pytest.raises(ValueError, match="batch_size is 'many'"):
        size(batch_size="many")


TASK = """
task: rows_of_mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
"""


@needs_lm_eval
@pytest.mark.slow  # lm_eval reads all of its own task files first
def test_the_command_runs_a_task_of_the_user(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["bdq"])  # the command replaces it
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"context": "Is it?", "choices": [" yes", " no"], "gold": 0}) + "\n")
    (tmp_path / "task.yaml").write_text(TASK.format(rows=rows))
    arguments = ["lm-eval", "run", "--model", "bdq", "--model_args", f"pretrained={folder},threads=1"]
    arguments += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--tasks", "rows_of_mine"])
    assert stop.value.code == 0
    assert "rows_of_mine" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--tasks", "no_such_task"])
    assert stop.value.code == 4
    assert "error: Tasks not found: no_such_task" in capsys.readouterr().err


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r'pip install "bdq-export\[lm-eval\]"'):
        command.run_lm_eval(["--help"])
