"""`--target-bits`: files of mixed weights run, say which linear has how many bits, and refuse what cannot be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bdq_export import export, inspect

QUICK: dict[str, Any] = {"calib_samples": 8, "calib_seq_len": 32, "min_top1": 0.0}


@pytest.mark.parametrize(
    ("family", "scheme", "options"),
    [
        ("llama", "w4a16", {"target_bits": 4.25}),
        ("phi3", "w4a16", {"target_bits": 3.5, "weights": "rtn"}),
        ("llama_biases", "w4a4kv4", {"target_bits": 3.3, "weights": "rtn"}),
        ("qwen3", "w3a16", {"target_bits": 3.4, "weights": "rtn", "transform": "none"}),
    ],
)
def test_the_file_has_the_bits_that_the_report_shows(
    family: str, scheme: str, options: dict[str, Any], model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    changes = {"partial_rotary_factor": 1.0} if family == "phi3" else {}
    result = export(model_dir(family, **changes), tmp_path / "out", scheme=scheme, **QUICK, **options)
    choice = json.loads((tmp_path / "out" / "bdq_report.json").read_text())["bits"]
    found = inspect(result.paths[0])
    assert float(found.metadata["bdq.average_bits"]) == pytest.approx(choice["average"], abs=1e-4)
    assert 0 < choice["average"] <= options["target_bits"]
    in_file = {}
    for name, bits in found.linear_bits.items():
        if ".layers." in name:
            in_file.setdefault(name.split(".")[2], []).append(bits)
    wanted: dict[str, list[int]] = {}
    for site in choice["sites"]:
        wanted.setdefault(str(site["layer"]), []).append(site["bits"])
    nodes = len(next(iter(in_file.values())))
    if nodes == 4:  # one node a site, in the same order
        assert in_file == wanted
    else:
        assert {layer: set(bits) for layer, bits in in_file.items()} == {
            layer: set(bits) for layer, bits in wanted.items()
        }
