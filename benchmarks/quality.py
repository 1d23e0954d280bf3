"""Quality and size of many weight-only exports of one model, in one table.

    python benchmarks/quality.py MODEL_DIR TEXT --out FOLDER [--windows 12] [--only N ...]

The rows of docs/measurements.md by `bdq compare`: windows of 1024 tokens that do not overlap, the first token of each
unscored, figures taken on the exported ONNX file. Rows that FOLDER has are not measured again: a run that was stopped
goes on where it was.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from bdq_export import compare

_DEFAULTS = "gptq+transform=auto"
_ENDS_4 = "keep=model.embed_tokens=4,lm_head=4"
ROWS = (
    ("w16a16", "rtn"),
    ("w8a16", "rtn"),
    ("w8a16", "rtn+transform=auto"),
    ("w4a16", "rtn"),
    ("w4a16", "rtn+symmetric=false"),
    ("w4a16", "rtn+transform=smooth"),
    ("w4a16", "hadamard-rtn"),
    ("w4a16", "bdq-rtn"),
    ("w4a16", "gptq"),
    ("w4a16", "gptq+symmetric=false"),
    ("w4a16", _DEFAULTS),
    ("w4a16", f"{_DEFAULTS}+{_ENDS_4}"),
    ("w4a16", f"rtn+{_ENDS_4}"),
    ("w4a16", f"{_DEFAULTS}+block_size=128"),
    ("w4a16", f"{_DEFAULTS}+accuracy_level=0"),
    ("w2a16", f"{_DEFAULTS}+effort=standard+block_size=32"),
    ("w8a8", "rtn+transform=auto+ops=qdq"),
    ("w8a8", "rtn+transform=auto+ops=qlinear"),
)


def main(arguments: Iterable[str] | None = None) -> None:
    """Read the command line, measure, print the table."""
    listed = "\n".join(f"{number:3} {scheme} {method}" for number, (scheme, method) in enumerate(ROWS))
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"rows:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument(
        "--only", nargs="*", type=int, default=list(range(len(ROWS))), choices=range(len(ROWS)), metavar="N"
    )
    given = parser.parse_args(None if arguments is None else list(arguments))
    for number in given.only:
        scheme, method = ROWS[number]
        compare(
            given.model_dir,
            given.out,
            schemes=[scheme],
            methods=[method],
            text=given.text,
            max_windows=given.windows,
            quiet=False,
        )
    print((given.out / "compare.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
