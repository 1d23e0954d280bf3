"""Linear operators alone: ours against `com.microsoft::MatMulNBits` and against what the machine can do, in one run.

    python benchmarks/compare_operators.py [--shapes 576x960 4096x4096 ...] [--rows 1 16 256 2048] [--weight-bits 4]
                                           [--activation-bits 4] [--threads 1] [--seconds 4] [--json]

A shape is KxN; the shapes are SmolLM2-135M's and Llama-3-8B's when none are given. The table has a line for each shape:

- time of MatMulNBits (4 bits, accuracy level 4: activations of 8 bits) in blocks of 32 and of 128 divided by the time
  of our `LowBitLinear` (one scale a channel), for each number of rows M; a dash where the block does not divide K;
- at M = 1, bytes of weights and scales that ours reads a second, as a share of what a plain vector sum of a large array
  reads;
- at M >= 2048, products of ours a second, as a share of a loop on registers alone of the instruction set that the
  library uses (`peak_int8.cc`). It needs a C++ compiler.

A model has nodes enough that weights come from memory, not from a cache, up to M = 16; with more rows they need not.
All large memory is moved to huge pages where the system allows it, as `bdq_runtime` does. Contenders take turns, the
vector sum too, so that a change of the machine's load meets all of them; a time is the 10 % quantile of the calls,
divided by the nodes: processor time of the process with one thread, wall time with more. `--json` has the times.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from machine_limits import PeakLoop, cold_bytes, last_cache_bytes, reader, selected_isa
from operator_models import Linear, Shape, low_bit_linear, matmul_nbits, nodes_for

from bdq_runtime.huge_pages import use_huge_pages
from bdq_runtime.opset import ACTIVATION_BITS, WEIGHT_BITS

SHAPES = ("576x960", "576x3072", "1536x576", "4096x4096", "4096x14336", "14336x4096")
ROWS = (1, 16, 256, 2048)
BLOCKS = (32, 128)
OURS, READER = "ours", "reader"
LEAST_CALLS = 5
PEAK_ROWS = 2048
DASH = "–"


@dataclass(frozen=True)
class Figures:
    """What was found for one shape and one number of rows.

    Attributes:
        k: channels in.
        n: channels out.
        rows: of the input.
        seconds: contender -> time of a node.
        ratios: contender -> its time divided by ours.
        read_share: of the bandwidth of a plain vector sum, that ours reads weights with; None but for one row.
        peak_share: of the products a second of a loop on registers; None with few rows or without such a loop.
    """

    k: int
    n: int
    rows: int
    seconds: Mapping[str, float]
    ratios: Mapping[str, float]
    read_share: float | None
    peak_share: float | None

    @classmethod
    def of(
        cls, ours: Linear, rows: int, seconds: Mapping[str, float], bandwidth: float | None, peak: float | None
    ) -> Figures:
        """From the times of a node, bytes read a second and products a second."""
        k, n, own = ours.shape.k, ours.shape.n, seconds[OURS]
        ratios = {name: value / own for name, value in seconds.items() if name != OURS}
        read_share = ours.nbytes / own / bandwidth if bandwidth and rows == 1 else None
        peak_share = rows * k * n / own / peak if peak and rows >= PEAK_ROWS else None
        return cls(k, n, rows, seconds, ratios, read_share, peak_share)


def take_turns(
    calls: Mapping[str, Callable[[], object]], clock: Callable[[], float], seconds: float
) -> dict[str, list[float]]:
    """Times of each call, until `seconds` have passed."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < LEAST_CALLS:
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def quantile(times: Sequence[float]) -> float:
    """The value that a tenth of the times do not exceed, at least one of them."""
    return sorted(times)[max(math.ceil(len(times) / 10), 1) - 1]


@dataclass(frozen=True)
class Bench:
    """How to measure.

    Attributes:
        threads: of each session.
        seconds: of a shape and a number of rows.
        cold: bytes of weights that no cache keeps.
        peak: the loop on registers.
    """

    threads: int
    seconds: float
    cold: int
    peak: PeakLoop

    def measure(self, contenders: Mapping[str, Linear], rows: int) -> Figures:
        """One shape, one number of rows."""
        ours = contenders[OURS]
        x = np.random.default_rng(rows).standard_normal((rows, ours.shape.k)).astype(np.float32)
        opened = {
            name: linear.open(nodes_for(linear, rows, self.cold), x, self.threads)
            for name, linear in contenders.items()
        }
        calls: dict[str, Callable[[], object]] = {name: found.run for name, found in opened.items()}
        if rows == 1:
            calls[READER] = reader(self.cold, self.threads)
        for call in calls.values():
            call()  # to warm up; and what a session allocates is in use then
        use_huge_pages()
        peak = self.peak.macs_per_second(self.threads) if rows >= PEAK_ROWS else None
        clock = time.process_time if self.threads == 1 else time.perf_counter
        found = {name: quantile(times) for name, times in take_turns(calls, clock, self.seconds).items()}
        bandwidth = self.cold / found.pop(READER) if rows == 1 else None
        seconds = {name: value / opened[name].nodes for name, value in found.items()}
        return Figures.of(ours, rows, seconds, bandwidth, peak)


def contenders_of(shape: Shape, weight_bits: int, activation_bits: int) -> dict[str, Linear]:
    """Ours first, then MatMulNBits in each block size that it can have."""
    random = np.random.default_rng(0)
    found = {OURS: low_bit_linear(shape, weight_bits, activation_bits, random)}
    for block in BLOCKS:
        theirs = matmul_nbits(shape, block, random)
        if theirs is not None:
            found[block_name(block)] = theirs
    return found


def block_name(block: int) -> str:
    """What MatMulNBits in blocks of this size is called."""
    return f"block {block}"


def table(figures: Sequence[Figures], with_peak: bool) -> str:
    """A line for each shape."""
    shapes = dict.fromkeys((found.k, found.n) for found in figures)
    all_rows = list(dict.fromkeys(found.rows for found in figures))
    by_key = {(found.k, found.n, found.rows): found for found in figures}
    heads, columns = ["K, N"], [[f"{k}, {n}" for k, n in shapes]]
    for rows in all_rows:
        here = [by_key[(*shape, rows)] for shape in shapes]
        for name in map(block_name, BLOCKS):
            heads.append(f"M={rows}, {name}")
            columns.append([f"{found.ratios[name]:.2f}" if name in found.ratios else DASH for found in here])
        if rows == 1:
            heads.append("M=1, of bandwidth")
            columns.append([percent(found.read_share) for found in here])
        if rows >= PEAK_ROWS and with_peak:
            heads.append(f"M={rows}, of peak")
            columns.append([percent(found.peak_share) for found in here])
    widths = [max(map(len, [head, *column])) for head, column in zip(heads, columns, strict=True)]
    lines = [heads, ["-" * width for width in widths], *map(list, zip(*columns, strict=True))]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def percent(share: float | None) -> str:
    """A share for the table."""
    return DASH if share is None else f"{share:.0%}"


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", default=list(map(Shape.parse, SHAPES)), metavar="KxN")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), metavar="M")
    parser.add_argument("--weight-bits", type=int, choices=WEIGHT_BITS, default=4)
    parser.add_argument("--activation-bits", type=int, choices=ACTIVATION_BITS, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each shape and M, at least")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if min(*arguments.rows, arguments.threads) < 1:
        parser.error("rows and threads are at least 1")

    isa, figures = selected_isa(), []
    with PeakLoop(isa) as peak:
        bench = Bench(arguments.threads, arguments.seconds, cold_bytes(last_cache_bytes()), peak)
        for shape in arguments.shapes:
            contenders = contenders_of(shape, arguments.weight_bits, arguments.activation_bits)
            for rows in arguments.rows:
                figures.append(bench.measure(contenders, rows))
                print(f"{shape}: M={rows} done", file=sys.stderr)
    settings: dict[str, Any] = {
        "isa": isa,
        "cold_bytes": bench.cold,
        **{key: getattr(arguments, key) for key in ("weight_bits", "activation_bits", "threads", "seconds")},
    }
    if arguments.json:
        result = {"figures": [asdict(found) for found in figures], "no_peak": peak.problem or None, **settings}
        print(json.dumps(result, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    print(table(figures, with_peak=not peak.problem))
    if peak.problem and max(arguments.rows) >= PEAK_ROWS:
        print(f"no share of the peak: {peak.problem}")


if __name__ == "__main__":
    main()
