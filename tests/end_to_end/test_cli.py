"""The commands on a tiny model: what they print where, and that two ways of asking give one answer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdq_export.cli.output import print_result

Bdq = Callable[..., Any]

PLAIN = ("--transform", "none", "--weights", "rtn", "--min-top1", "0")
TIMES = {"bdq_report.json", "report.html"}


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name not in TIMES
    }


def test_bdq_export_is_bdq_export(bdq: Bdq, bdq_export_command: Bdq, sources: Path, tmp_path: Path) -> None:
    assert bdq("export", sources / "model", tmp_path / "a", *PLAIN).code == 0
    assert bdq_export_command(sources / "model", tmp_path / "b", *PLAIN).code == 0
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")
    helps = [bdq("export", "--help").out, bdq_export_command("--help").out]
    assert helps[0].replace("bdq export", "").split()[-100:] == helps[1].replace("bdq-export", "").split()[-100:]


def test_a_configuration_repeats_an_export(bdq: Bdq, sources: Path, tmp_path: Path) -> None:
    flags = [*PLAIN, "--block-size", "64", "--asymmetric", "--keep", "*.v_proj=8", "--keep", "lm_head=4", "--seed", "7"]
    assert bdq("export", sources / "model", tmp_path / "a", *flags).code == 0
    config = tmp_path / "a" / "bdq_config.json"
    assert bdq("export", sources / "model", tmp_path / "b", "--config", config).code == 0
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")

    assert bdq("export", sources / "model", tmp_path / "c", "--config", config, "--scheme", "w8a16").code == 0
    before, after = (json.loads((tmp_path / name / "bdq_config.json").read_text()) for name in "ac")
    assert after == {**before, "scheme": "w8a16"}


def test_a_flag_equal_to_its_default_wins_over_the_configuration(bdq: Bdq, sources: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"scheme": "w8a16", "transform": "none", "weights": "rtn", "min_top1": 0, "keep": ["*=8"]}')
    outcome = bdq("export", sources / "model", tmp_path / "out", "--config", config, "--scheme", "w4a16", "--quiet")
    assert outcome.code == 0
    written = json.loads((tmp_path / "out" / "bdq_config.json").read_text())
    assert (written["scheme"], written["weights"], written["keep"]) == ("w4a16", "rtn", ["*=8"])


def test_json_is_all_there_is_on_stdout(bdq: Bdq, sources: Path, tmp_path: Path) -> None:
    outcome = bdq("export", sources / "model", tmp_path / "out", *PLAIN, "--json")
    result = json.loads(outcome.out)
    assert outcome.code == 0
    assert result["paths"][0] == str(tmp_path / "out" / "model.onnx")
    assert sorted(map(str, (tmp_path / "out").iterdir())) == sorted(result["paths"])
    assert result["metrics"]["scheme"] == "w4a16"
    assert 0 <= result["metrics"]["top1_agreement"] <= 1
    assert "verify: done" in outcome.err


def test_quiet_prints_the_result_only(bdq: Bdq, sources: Path, tmp_path: Path) -> None:
    outcome = bdq("export", sources / "model", tmp_path / "out", *PLAIN, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    assert str(tmp_path / "out" / "model.onnx") in "".join(outcome.out.split()), "a long path is not cut"


def test_infinity_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"perplexity": math.inf, "tasks": ({"accuracy": math.nan, "rows": 3},)}, "", as_json=True)
    assert json.loads(capsys.readouterr().out) == {"perplexity": None, "tasks": [{"accuracy": None, "rows": 3}]}


def test_dry_run_estimates_and_writes_nothing(bdq: Bdq, sources: Path, tmp_path: Path) -> None:
    outcome = bdq("export", sources / "model", tmp_path / "out", "--dry-run", "--json")
    result = json.loads(outcome.out)
    assert (outcome.code, result["paths"]) == (0, [])
    assert result["metrics"]["memory_bytes"] > 10**8
    assert result["metrics"]["disk_bytes"] > 10**6
    assert not (tmp_path / "out").exists()


def test_force_replaces_an_export(bdq: Bdq, sources: Path, exported: Path) -> None:
    assert bdq("export", sources / "model", exported, *PLAIN, "--scheme", "w8a16", "--force").code == 0
    assert json.loads((exported / "bdq_config.json").read_text())["scheme"] == "w8a16"
    assert [path for path in exported.iterdir() if path.name.startswith(".")] == []


def test_version(bdq: Bdq) -> None:
    outcome = bdq("--version")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("bdq-export 0.")


def test_run_streams_text(bdq: Bdq, exported: Path) -> None:
    for model in (exported, exported / "model.onnx"):
        outcome = bdq("run", model, "--prompt", "a b", "--max-new-tokens", "4", "--threads", "1")
        assert (outcome.code, outcome.err) == (0, "")
        assert outcome.out.endswith("\n")
    drawn = [
        bdq("run", exported, "--prompt", "a", "--temperature", "2", "--seed", seed, "--threads", "1").out
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_eval_measures_a_text(bdq: Bdq, exported: Path, sources: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The thin thread of a long text, which goes on and on. " * 8)
    task = tmp_path / "task.jsonl"
    task.write_text('{"context": "a", "choices": [" b", " c"], "gold": 0}\n')
    flags = ["--text", text, "--seq-len", "64", "--reference", sources / "model", "--tasks", task, "--threads", "1"]
    outcome = bdq("eval", exported, *flags, "--json")
    result = json.loads(outcome.out)
    assert outcome.code == 0
    assert (result["perplexity"]["windows"], result["perplexity"]["scored_tokens"]) == (6, 6 * 63)
    assert result["perplexity"]["kl_divergence"] > 0
    assert result["tasks"][0]["rows"] == 1
    assert "perplexity: done" in outcome.err

    quiet = bdq("eval", exported, *flags, "--quiet")
    assert (quiet.code, quiet.err) == (0, "")
    assert f"{result['perplexity']['perplexity']:.4f}" in quiet.out


def test_bench_times_a_model(bdq: Bdq, exported: Path) -> None:
    outcome = bdq("bench", exported, "--prompt-len", "8", "--new-tokens", "4", "--threads", "1", "--json")
    result = json.loads(outcome.out)
    assert (outcome.code, outcome.err) == (0, "")
    assert min(result["prefill_tokens_per_second"], result["decode_tokens_per_second"]) > 0
    assert "decode, 4 steps" in bdq("bench", exported, "--prompt-len", "8", "--new-tokens", "4").out


def test_inspect_tells_what_is_executed(bdq: Bdq, exported: Path) -> None:
    outcome = bdq("inspect", exported, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out)["scheme"] == "w4a16"
    assert "MatMulNBits" in bdq("inspect", exported / "model.onnx").out


@pytest.mark.parametrize("command", [["run", "--prompt", "a"], ["eval", "--text", "text.txt"], ["bench"], ["inspect"]])
def test_a_model_that_is_no_model(command: list[str], refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "zero.onnx").write_bytes(b"")
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    (tmp_path / "text.txt").write_text("text " * 1000)
    arguments = [tmp_path / word if word.endswith(".txt") else word for word in command[1:]]
    for name in ("missing", "missing.onnx", "empty", "zero.onnx", "bad.onnx"):
        refused(4, command[0], tmp_path / name, *arguments)


@pytest.mark.parametrize(
    ("code", "words", "command"),
    [
        (4, "less than one window of 64", ["eval", "--text", "short.txt", "--seq-len", "64"]),
        (4, "does not exist", ["eval", "--text", "none.txt"]),
        (4, "is empty", ["eval", "--text", "empty.txt"]),
        (4, "binary", ["eval", "--text", "binary.txt"]),
        (4, "does not exist", ["eval", "--tasks", "none.txt"]),
        (4, "line 1", ["eval", "--tasks", "short.txt"]),
        (2, "nothing to evaluate", ["eval"]),
        (2, "context is 256", ["eval", "--text", "short.txt", "--seq-len", "512"]),
        (4, "does not exist", ["eval", "--text", "long.txt", "--seq-len", "64", "--reference", "none.txt"]),
        (2, "--prompt", ["run"]),
        (2, "empty", ["run", "--prompt", ""]),
        (2, "--temperature", ["run", "--prompt", "a", "--temperature", "-1"]),
        (4, "chat template", ["run", "--prompt", "a", "--chat"]),
        (4, "256", ["run", "--prompt", "a" * 300]),
        (4, "256", ["bench", "--prompt-len", "300"]),
        (2, "--new-tokens", ["bench", "--new-tokens", "0"]),
        (2, "--threads", ["bench", "--threads", "0"]),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_of_the_other_commands(
    code: int, words: str, command: list[str], exported: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    for name, content in (("short", b"short"), ("empty", b""), ("binary", b"a\0b"), ("long", b"long " * 50)):
        (tmp_path / f"{name}.txt").write_bytes(content)
    arguments = [tmp_path / word if word.endswith(".txt") else word for word in command[1:]]
    assert words in refused(code, command[0], exported, *arguments)
