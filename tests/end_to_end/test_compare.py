"""`bdq compare` on a tiny model: rows, what a second run does, and what is refused before anything runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdq_export import compare
from bdq_export.checkpoint import open_checkpoint
from bdq_export.commands import compare as command
from bdq_export.errors import UsageError

QUICK: dict[str, Any] = {"calib_samples": 4, "calib_seq_len": 32, "seq_len": 32, "max_windows": 2, "threads": 1}
FLAGS = [word for name, value in QUICK.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The thin thread of a long text, which goes on and on. " * 4)
    return path


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"context": "a", "choices": [" b", " c"], "gold": 0}\n' * 2)
    return path


def test_two_methods_and_two_seeds(
    sources: Path, text: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "schemes": ["w4a4kv4"], "text": text, "tasks": [task]}
    out = tmp_path / "out"
    result = compare(sources / "model", out, methods=["rtn", "diag+weights=rtn"], seeds=[0, 1], **settings)

    places = [("w4a4kv4", method, seed) for method in ("rtn", "diag+weights=rtn") for seed in (0, 1)]
    assert [row.place for row in result.rows] == places == list(result.measured)
    assert [row.transform for row in result.rows] == ["none", "none", "diag", "diag"]
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.md"], "exports are deleted"
    for row in result.rows:
        figures = row.figures
        assert row.error is None
        assert None not in figures.values()
        assert figures["gap"] == pytest.approx(math.log(figures["perplexity"] / figures["float_perplexity"]))
        assert figures["kl"] > 0
        assert 0 <= figures["top1"] <= 1
        assert figures["pairs.accuracy"] in (0, 0.5, 1)
        assert figures["seconds"] > 0
        assert figures["peak_bytes"] > 1e8 > figures["model_bytes"] > 1e4
    assert len({row.figures["float_perplexity"] for row in result.rows}) == 1
    plain, turned = result.summary
    assert turned.mean["activation_flatness"] < plain.mean["activation_flatness"]
    gaps = [row.figures["gap"] for row in result.rows[2:]]
    assert turned.mean["gap"] == pytest.approx(sum(gaps) / 2)
    assert turned.spread["gap"] == pytest.approx(abs(gaps[0] - gaps[1]) / math.sqrt(2))
    assert turned.spread["gap"] > 0, "the seed turns nothing"
    table = (out / "compare.md").read_text()
    assert f"| w4a4kv4 | rtn | 2 | {plain.mean['perplexity']:.3f} ± {plain.spread['perplexity']:.3f} |" in table
    assert statistics.stdev(gaps) == turned.spread["gap"]

    content = json.loads((out / "compare.json").read_text())
    assert [(row["method"], row["seed"]) for row in content["rows"]] == [place[1:] for place in places]
    assert str(tmp_path) not in (out / "compare.json").read_text() + table

    # The same again: nothing runs. One more method, and another option of the other: only those do.
    exported: list[tuple[str, int]] = []

    def measure(_model: Any, _folder: Path, options: Any, *_rest: Any) -> tuple[str, dict[str, float]]:
        exported.append((options.weights, options.seed))
        return "none", {"perplexity": 1.0}

    monkeypatch.setattr("bdq_export.comparison.measure.measure_export", measure)
    again = compare(sources / "model", out, methods=["rtn", "diag+weights=rtn"], seeds=[0, 1], **settings)
    assert (again.measured, again.rows, exported) == ((), result.rows, [])
    more = compare(sources / "model", out, methods=["rtn", "gptq"], seeds=[1], **settings)
    assert exported == [("gptq", 1)]
    assert more.rows[:4] == result.rows
    changed = compare(sources / "model", out, methods=["rtn"], seeds=[1], **{**settings, "calib_samples": 5})
    assert exported == [("gptq", 1), ("rtn", 1)]
    assert changed.rows[0] == result.rows[0]
    assert changed.rows[1].figures == {"perplexity": 1.0}


def test_a_failed_row_is_recorded_and_tried_again(sources: Path, task: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "tasks": [task], "methods": ["gptq", "diag"], "schemes": ["w4a4", "w4a16"], "seeds": [0]}
    calib = tmp_path / "calib.txt"
    calib.write_text("short")
    out = tmp_path / "out"
    result = compare(sources / "model", out, calib=str(calib), **settings)
    assert [row.place for row in result.rows if row.error] == [row.place for row in result.rows]
    assert "no such rotations" in str(result.rows[3].error)
    assert result.measured == tuple(row.place for row in result.rows[:3])
    calib.write_text("A longer text that calibration can use. " * 20)
    result = compare(sources / "model", out, calib=str(calib), **{**settings, "methods": ["gptq"]})
    assert [row.error is None for row in result.rows] == [True, False, True, False]
    assert "perplexity" not in result.rows[0].figures
    assert "pairs.accuracy" in result.rows[0].figures
    assert "| w4a4 | gptq | 1 |" in (out / "compare.md").read_text()


def test_figures_stay_until_there_are_new_ones(
    sources: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(value: float) -> Callable[..., Any]:
        return lambda *_: ("none", {"pairs.accuracy": value})

    def broken(*_: Any) -> Any:
        raise ValueError("no export today")

    place, settings = "bdq_export.comparison.measure.measure_export", {**QUICK, "tasks": [task], "schemes": ["w4a4"]}
    found = []
    for samples, export in ((4, measured(0.5)), (5, broken), (5, measured(1.0))):
        monkeypatch.setattr(place, export)
        result = compare(sources / "model", tmp_path / "out", methods=["rtn"], **{**settings, "calib_samples": samples})
        stored = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
        assert [row["figures"] for row in stored] == [row.figures for row in result.rows]
        found.append((result.rows[0].figures, len(result.measured), result.all_failed))
    assert found == [
        ({"pairs.accuracy": 0.5}, 1, False),
        ({"pairs.accuracy": 0.5}, 1, True),
        ({"pairs.accuracy": 1.0}, 1, False),
    ]


def test_a_run_without_any_figures_ends_with_an_error(
    bdq: Callable[..., Any], sources: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(_model: Any, _folder: Path, options: Any, *_: Any) -> Any:
        if options.weights == "gptq":
            raise ValueError("no export today")
        return "none", {"pairs.accuracy": 1.0}

    monkeypatch.setattr("bdq_export.comparison.measure.measure_export", export)
    arguments = ["compare", sources / "model", "--out", tmp_path / "out", "--tasks", task, "--schemes", "w4a4"]
    outcome = bdq(*arguments, "--methods", "gptq", "--seeds", "0", "1", "--json")
    assert outcome.code == 1
    assert outcome.errors == [
        "error: none of the 2 exports of this run was measured; the first: unexpected ValueError: no export today"
    ]
    assert [row["place"][1:] for row in json.loads(outcome.out)["failed"]] == [["gptq", 0], ["gptq", 1]]
    some = bdq(*arguments, "--methods", "gptq", "rtn")
    assert some.code == 0
    assert "w4a4, gptq, seed 0: unexpected ValueError: no export today" in " ".join(some.out.split())
    assert bdq(*arguments, "--methods", "rtn").code == 0, "nothing was left to do"


def test_another_chat_template_is_refused(
    model: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens half of the text that a model calibrates on. Models are told apart by every byte of them."""
    monkeypatch.setattr("bdq_export.comparison.measure.measure_export", lambda *_: ("none", {"pairs.accuracy": 1.0}))
    settings = {**QUICK, "schemes": ["w4a16"], "methods": ["rtn"], "tasks": [task]}
    assert compare(model, tmp_path / "out", **settings).measured
    content = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert content["source_hash"] == open_checkpoint(model).content_hash()
    (model / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(UsageError, match=r"another evaluation \(tokenizer\)"):
        compare(model, tmp_path / "out", **settings)


def test_the_command(bdq: Callable[..., Any], sources: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["compare", sources / "model", "--out", tmp_path / "out", "--text", text, *FLAGS]
    arguments += ["--schemes", "w4a16", "w8a16", "--methods", "rtn", "--keep-exports"]
    outcome = bdq(*arguments)
    assert outcome.code == 0, outcome.err
    assert "compare: done" in outcome.err
    assert "w8a16 rtn seed 0: done" in outcome.err
    assert "w8a16" in outcome.out
    kept = sorted(path.name for path in (tmp_path / "out" / "exports").iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["w4a16-rtn-0", "w8a16-rtn-0"]
    result = json.loads(bdq(*arguments, "--json", "--quiet").out)
    assert result["measured"] == []
    assert [row["scheme"] for row in result["rows"]] == ["w4a16", "w8a16"]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("method 'awq' is unknown", ["--methods", "rtn,awq"]),
        ("scheme 'w5a4'", ["--schemes", "w4a4", "w5a4"]),
        ("seed is 'x'", ["--seeds", "0", "x"]),
        ("method diag: transform diag leaves out", ["--schemes", "w4a16", "--methods", "rtn", "diag"]),
        ("method bdq+loss=l2: loss is 'l2'", ["--methods", "bdq+loss=l2"]),
        ("--max-windows is 0", ["--max-windows", "0"]),
        ("--seq-len is 512, the model's context is 256", ["--seq-len", "512"]),
        ("--calib-seq-len is 257, the model's context is 256", ["--calib-seq-len", "257"]),
        ("--calib-seq-len is 300, the model's context is 256", ["--methods", "bdq", "rtn+calib_seq_len=300"]),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(
    words: str, arguments: list[str], refused: Callable[..., str], sources: Path, text: Path, tmp_path: Path
) -> None:
    line = refused(2, "compare", sources / "model", "--out", tmp_path / "out", "--text", text, *arguments)
    assert words in line


def test_several_processes_would_write_one_folder(
    refused: Callable[..., str], sources: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    line = refused(2, "compare", sources / "model", "--out", tmp_path / "out", "--text", text, *FLAGS)
    assert "bdq compare is for one process, but torchrun started 2" in line
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "nothing to measure" in refused(2, "compare", sources / "model", "--out", tmp_path / "out")


def test_bad_input_is_refused_at_once(refused: Callable[..., str], sources: Path, text: Path, tmp_path: Path) -> None:
    start = ["compare", sources / "model", "--out", tmp_path / "out"]
    assert "nothing to measure" in refused(2, *start)
    assert "does not exist" in refused(4, *start, "--text", tmp_path / "none.txt")
    assert "less than one window" in refused(4, *start, "--text", text, "--seq-len", "250")
    assert "does not exist" in refused(4, *start, "--tasks", tmp_path / "none.jsonl")
    assert "line 1" in refused(4, *start, "--tasks", text)
    assert "does not exist" in refused(4, "compare", tmp_path / "none", *start[2:], "--text", text)
    assert command.EXPORTS not in [path.name for path in tmp_path.rglob("*")]
