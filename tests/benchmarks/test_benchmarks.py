"""The comparison scripts: turns, ratios, and what they measure of a child process."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bdq_export.comparison.methods import parse_method


def load(name: str) -> ModuleType:
    file = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    compare_genai = load("compare_genai")
    calls: list[str] = []

    def contender(name: str, seconds: list[float]) -> object:
        def run() -> tuple[float, list[float]]:
            calls.append(name)
            value = seconds[calls.count(name) - 1]
            return value, [value / 10] * 3

        return run

    speeds = compare_genai.compare({"a": contender("a", [9, 1, 2, 4]), "b": contender("b", [9, 4, 4, 4])}, 8, 3)
    assert calls == ["a", "b"] * 4
    assert (speeds["a"].prefill, speeds["a"].prefill_best) == (4.0, 8.0)
    assert speeds["a"].decode == pytest.approx(5.0)
    assert compare_genai.ratios(speeds, "b")["a"] == pytest.approx(
        {"prefill": 2.0, "prefill_best": 4.0, "decode": 2.0, "decode_best": 4.0}
    )


def test_a_contender_has_its_own_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    in_own_process = importlib.import_module("compare_genai").in_own_process
    run = in_own_process(functools.partial, os.getpid)
    assert run() == run() != os.getpid()
    with pytest.raises(RuntimeError, match="partial failed"):
        in_own_process(functools.partial, os.getpid, 1)()
    assert "getpid() takes no arguments" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="children's memory is not reported")
def test_a_child_is_measured(tmp_path: Path) -> None:
    export_cost = load("export_cost")
    code = "import pathlib, sys; x = bytearray(150_000_000); x[::4096] = b'x' * len(x[::4096]);"
    code += f"pathlib.Path({str(tmp_path)!r}, 'out').write_bytes(b'y' * 1000)"
    cost = export_cost.run_child([sys.executable, "-c", code], tmp_path)
    assert 150e6 < cost.peak_bytes < 2e9
    assert cost.output_bytes == 1000
    assert cost.wall_seconds > 0
    with pytest.raises(RuntimeError, match=r"returned 3: .*broken"):
        export_cost.run_child([sys.executable, "-c", "print('broken'); raise SystemExit(3)"], tmp_path)
    least = export_cost.smallest([cost, export_cost.Cost(1e-9, 9e9, 1, 10**9)])
    assert least == export_cost.Cost(1e-9, cost.cpu_seconds, 1, 1000)


def test_every_row_of_the_quality_table_is_an_export_of_its_own() -> None:
    rows = load("quality").ROWS
    shared = {"calib": "self"}
    options = {parse_method(method).options(scheme, 0, shared) for scheme, method in rows}
    assert len(options) == len(rows)
