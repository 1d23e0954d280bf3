"""Quality and size of many exports of one model, as a Markdown table.

    python benchmarks/quality.py MODEL_DIR TEXT --out FOLDER [--windows 12] [--only NAME ...] [--json FILE]

Each row is exported, and its perplexity taken on the exported ONNX file: windows of 1024 tokens that do not overlap,
the first token of each unscored. An export that is already in FOLDER is not made again, and a row that is already in
the JSON file is not measured again: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bdq_export import evaluate, export
from bdq_export.errors import VerificationError

_PLAIN: dict[str, Any] = {"transform": "none", "weights": "rtn"}
_GPTQ: dict[str, Any] = {"transform": "none", "weights": "gptq"}
_ENDS_4 = ("model.embed_tokens=4", "lm_head=4")
ROWS: dict[str, dict[str, Any]] = {
    "float": {"scheme": "w16a16", **_PLAIN},
    "w8a16, rtn": {"scheme": "w8a16", **_PLAIN},
    "w8a16": {"scheme": "w8a16", "weights": "rtn"},
    "w4a16, rtn": _PLAIN,
    "w4a16, rtn, asymmetric": {**_PLAIN, "symmetric": False},
    "w4a16, rtn, smooth": {**_PLAIN, "transform": "smooth"},
    "w4a16, rtn, hadamard": {**_PLAIN, "transform": "hadamard"},
    "w4a16, rtn, bdq": {**_PLAIN, "transform": "bdq"},
    "w4a16, gptq": _GPTQ,
    "w4a16, gptq, asymmetric": {**_GPTQ, "symmetric": False},
    "w4a16": {},
    "w4a16, all 4 bit": {"keep": _ENDS_4},
    "w4a16, rtn, all 4 bit": {**_PLAIN, "keep": _ENDS_4},
    "w4a16, block 128": {"block_size": 128},
    "w4a16, float32 kernels": {"accuracy_level": 0},
    "w2a16": {"scheme": "w2a16", "block_size": 32, "min_top1": 0.0},
    "w8a8 static qdq": {"scheme": "w8a8", "ops": "qdq", "weights": "rtn", "min_top1": 0.0},
    "w8a8 static qlinear": {"scheme": "w8a8", "ops": "qlinear", "weights": "rtn", "min_top1": 0.0},
}


def measure(model_dir: Path, text: Path, folder: Path, options: Mapping[str, Any], windows: int) -> dict[str, Any]:
    """Export with `options` into `folder` unless it is there, and measure the file."""
    if not (folder / "bdq_report.json").exists():
        try:
            export(model_dir, folder, **options)
        except VerificationError as error:
            print(error)
    report = json.loads((folder / "bdq_report.json").read_text())
    found = evaluate(folder, text=text, max_windows=windows).perplexity
    assert found is not None, "a text was given"
    return {
        "perplexity": found.perplexity,
        "megabytes": sum(path.stat().st_size for path in folder.glob("model.onnx*")) / 1e6,
        "transform": report["transform"],
        "seconds": sum(stage["seconds"] for stage in report["stages"]),
        "peak_gigabytes": max(stage["peak_bytes"] for stage in report["stages"]) / 1e9,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown; ratios are against the row "float" where there is one."""
    base = rows.get("float", {}).get("perplexity")
    lines = [
        "| export | perplexity | ratio to float | MB | transform | export s | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratio = f"{row['perplexity'] / base:.4f}" if base else "-"
        lines.append(
            f"| {name} | {row['perplexity']:.3f} | {ratio} | {row['megabytes']:.1f} | {row['transform']} | "
            f"{row['seconds']:.0f} | {row['peak_gigabytes']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(None if arguments is None else list(arguments))
    given.out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    if given.json and given.json.exists():
        rows = json.loads(given.json.read_text())
    for name in given.only:
        if name in rows:
            continue
        folder = given.out / name.replace(", ", "-").replace(" ", "_")
        rows[name] = measure(given.model_dir, given.text, folder, ROWS[name], given.windows)
        print(name, rows[name], flush=True)
        if given.json:
            given.json.write_text(json.dumps(rows, indent=2))
    print(table(rows))


if __name__ == "__main__":
    main()
