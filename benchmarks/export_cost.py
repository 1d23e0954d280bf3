"""Wall time and peak memory of an export against onnxruntime-genai's builder at int4, on the same folder.

    python benchmarks/export_cost.py MODEL_DIR [--rounds 3] [--json] [-- extra bdq-export options]

Both run as child processes, in turn; ours as `bdq-export --scheme w4a16 --weights rtn --transform none` unless options
are given after `--`. The smallest of the rounds counts: other load can only add. Needs `pip install onnxruntime-genai`
and a system that reports the memory of children (not Windows).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_DEFAULT_OPTIONS = ("--scheme", "w4a16", "--weights", "rtn", "--transform", "none")
_EXPORT = "from bdq_export.cli import main_export; import sys; sys.exit(main_export())"


@dataclass(frozen=True)
class Cost:
    """What one child process took.

    Attributes:
        wall_seconds: from start to end.
        cpu_seconds: user and system time, children included.
        peak_bytes: largest resident set of it or of one of its children.
        output_bytes: size of everything it wrote.
    """

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    output_bytes: int


def run_child(command: list[str], output: Path) -> Cost:
    """Run `command`, which writes the folder `output`.

    Raises:
        RuntimeError: it failed; the message has the end of what it printed.
    """
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command[:4])} ... returned {child.returncode}: {log.read()[-2000:]}")
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, size)


def smallest(costs: list[Cost]) -> Cost:
    """Of each figure the smallest."""
    return Cost(*(min(values) for values in zip(*(asdict(cost).values() for cost in costs), strict=True)))


def measure(model: Path, options: list[str], rounds: int) -> dict[str, Cost]:
    """Both exports, in turn, `rounds` times."""
    costs: dict[str, list[Cost]] = {"bdq-export": [], "genai builder": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="export-cost-") as scratch:
            ours, theirs, cache = (Path(scratch) / name for name in ("ours", "theirs", "cache"))
            ours_command = [sys.executable, "-c", _EXPORT, str(model), str(ours), *options]
            theirs_command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
            theirs_command += ["-i", str(model), "-o", str(theirs), "-p", "int4", "-e", "cpu", "-c", str(cache)]
            costs["bdq-export"].append(run_child(ours_command, ours))
            costs["genai builder"].append(run_child(theirs_command, theirs))
    return {name: smallest(found) for name, found in costs.items()}


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("options", nargs="*", help="options of bdq-export, after --")
    arguments = parser.parse_args()
    options = arguments.options or list(_DEFAULT_OPTIONS)
    costs = measure(arguments.model, options, arguments.rounds)
    ours, theirs = (asdict(costs[name]) for name in ("bdq-export", "genai builder"))
    ratio = {key: ours[key] / theirs[key] for key in ours}
    if arguments.json:
        print(json.dumps({"bdq-export": ours, "genai builder": theirs, "ratio": ratio, "options": options}, indent=2))
        return
    print(f"bdq-export {' '.join(options)}; smallest of {arguments.rounds} rounds")
    print(f"{'':16}{'wall s':>10}{'cpu s':>10}{'peak MB':>10}{'output MB':>12}")
    for name, cost in costs.items():
        print(
            f"{name:16}{cost.wall_seconds:10.1f}{cost.cpu_seconds:10.1f}{cost.peak_bytes / 1e6:10.0f}"
            f"{cost.output_bytes / 1e6:12.1f}"
        )
    print(
        f"{'ratio':16}"
        + "".join(f"{ratio[key]:{width}.2f}" for key, width in zip(ratio, (10, 10, 10, 12), strict=True))
    )


if __name__ == "__main__":
    main()
