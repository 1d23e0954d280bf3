"""Speed, load time and memory of exported folders against llama.cpp, onnxruntime-genai and ONNX Runtime, in one run.

    python benchmarks/compare_runtimes.py NAME=KIND:PATH ... [--base NAME ...] [--prompt-len 512] [--new-tokens 64]
                                          [--threads 2] [--rounds 5] [--json]

KIND is `bdq` (a folder through `bdq_runtime`, its operator library registered), `stock` (the same without the library:
function bodies on plain ONNX Runtime; a float export is the fp32 baseline), `genai` (a folder through
onnxruntime-genai) or `llama` (a .gguf file through llama-cpp-python). For example

    python benchmarks/compare_runtimes.py w4a4kv4=bdq:out-w4a4kv4 bodies=stock:out-w4a4kv4 genai-int4=genai:genai-int4 \
        llama-q4_0=llama:model-q4_0.gguf --base genai-int4 --base llama-q4_0

Contenders take turns, so that a change of the machine's load meets all of them. Prompts are the same random tokens;
decoding is greedy. Speeds are medians over the rounds and the best round. Load time (files in the page cache) and peak
resident memory of one round come from a fresh process each; so do the speeds. The comparison needs the peers' packages:
onnxruntime-genai, llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
from compare_genai import Round, Speed, compare, in_own_process, ratios, with_genai

from bdq_runtime.bench import peak_rss_bytes, time_round
from bdq_runtime.model import LanguageModel

WARM_UP_STEPS = 4
KINDS = ("bdq", "stock", "genai", "llama")


@dataclass(frozen=True)
class Contender:
    """A name, what runs it, and its files."""

    name: str
    kind: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> Contender:
        """`NAME=KIND:PATH`."""
        name, _, rest = text.partition("=")
        kind, _, path = rest.partition(":")
        if not name or kind not in KINDS or not path:
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=KIND:PATH with KIND one of {', '.join(KINDS)}")
        return cls(name, kind, Path(path))


@dataclass(frozen=True)
class Footprint:
    """What one fresh process took: seconds to open a model whose files were just read, bytes at the peak of a round."""

    load_seconds: float
    peak_bytes: int


def open_round(contender: Contender, prompt: np.ndarray, new_tokens: int, threads: int) -> Round:
    """Open the contender; each call of the result is one prefill and its decode steps."""
    if contender.kind == "genai":
        return with_genai(contender.path, prompt, new_tokens, threads)
    if contender.kind == "llama":
        return with_llama(contender.path, prompt, new_tokens, threads)
    model = LanguageModel(contender.path, threads=threads, use_library=contender.kind == "bdq")
    return lambda: time_round(model, prompt, new_tokens)


def with_llama(path: Path, prompt: np.ndarray, new_tokens: int, threads: int) -> Round:
    """A round of a .gguf file through llama-cpp-python, with the same number of threads."""
    from llama_cpp import Llama

    steps = new_tokens + WARM_UP_STEPS
    model = Llama(
        str(path), n_ctx=len(prompt) + steps + 1, n_batch=len(prompt), n_ubatch=len(prompt), n_threads=threads,
        n_threads_batch=threads, verbose=False,
    )  # fmt: skip
    ids = prompt.tolist()

    def best() -> int:
        return int(np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),)).argmax())

    def run() -> tuple[float, list[float]]:
        model.reset()
        model._ctx.kv_cache_clear()
        start = time.perf_counter()
        model.eval(ids)
        token = best()
        prefill = time.perf_counter() - start
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            model.eval([token])
            token = best()
            seconds.append(time.perf_counter() - start)
        return prefill, seconds[WARM_UP_STEPS:]

    return run


def footprint(contender: Contender, job: tuple[int, int, int]) -> Footprint:
    """Load time and memory of a fresh process."""
    command = [sys.executable, __file__, f"{contender.name}={contender.kind}:{contender.path}", "--child", "--json"]
    for flag, value in zip(("--prompt-len", "--new-tokens", "--threads"), job, strict=True):
        command += [flag, str(value)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{contender.name} returned {done.returncode}: {done.stderr.strip()[-400:]}")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def measure_here(contender: Contender, prompt: np.ndarray, new_tokens: int, threads: int) -> Footprint:
    """The child's half of `footprint`."""
    read(contender.path)
    import_peer(contender.kind)
    start = time.perf_counter()
    run = open_round(contender, prompt, new_tokens, threads)
    load = time.perf_counter() - start
    run()
    return Footprint(load, peak_rss_bytes() or 0)


def import_peer(kind: str) -> None:
    """Import what runs the contender: our own modules are there already, and importing is not loading a model."""
    if kind == "genai":
        import onnxruntime_genai  # noqa: F401
    elif kind == "llama":
        import llama_cpp  # noqa: F401


def read(path: Path) -> None:
    """Bring the files of a model into the page cache."""
    for file in path.parent.glob(f"{path.name}*") if path.is_file() else path.iterdir():
        with file.open("rb") as stream:
            while stream.read(1 << 20):
                pass


def table(speeds: dict[str, Speed], footprints: dict[str, Footprint], bases: list[str]) -> str:
    """The figures, a line for each contender."""
    heads = ("prefill", "best", "decode", "best", "load s", "peak MB")
    lines = [f"{'tokens per second':16}" + "".join(f"{head:>10}" for head in heads)]
    for name, speed in speeds.items():
        line = f"{name:16}" + "".join(f"{value:10.1f}" for value in asdict(speed).values())
        if name in footprints:
            line += f"{footprints[name].load_seconds:10.3f}{footprints[name].peak_bytes / 1e6:10.0f}"
        lines.append(line)
    for base in bases:
        lines.append(f"ratio to {base}")
        for name, ratio in ratios(speeds, base).items():
            lines.append(f"{name:16}" + "".join(f"{value:10.2f}" for value in ratio.values()))
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", type=Contender.parse, nargs="+", metavar="NAME=KIND:PATH")
    parser.add_argument("--base", action="append", default=[], help="give ratios to this contender")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vocab", type=int, default=32000, help="prompt tokens are drawn below this id")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.base) - {contender.name for contender in arguments.contenders}
    if unknown:
        parser.error(f"--base {sorted(unknown)[0]} is no contender")

    prompt = np.random.default_rng(0).integers(0, arguments.vocab, arguments.prompt_len)
    if arguments.child:
        found = measure_here(arguments.contenders[0], prompt, arguments.new_tokens, arguments.threads)
        print(json.dumps(asdict(found)))
        return
    job = (arguments.prompt_len, arguments.new_tokens, arguments.threads)
    footprints = {contender.name: footprint(contender, job) for contender in arguments.contenders}
    rounds: dict[str, Callable[[], tuple[float, list[float]]]] = {
        contender.name: in_own_process(open_round, contender, prompt, arguments.new_tokens, arguments.threads)
        for contender in arguments.contenders
    }
    speeds = compare(rounds, arguments.prompt_len, arguments.rounds)
    if arguments.json:
        result: dict[str, Any] = {
            "tokens_per_second": {name: asdict(speed) for name, speed in speeds.items()},
            "footprint": {name: asdict(found) for name, found in footprints.items()},
            "ratios": {base: ratios(speeds, base) for base in arguments.base},
            **{key: getattr(arguments, key) for key in ("prompt_len", "new_tokens", "threads", "rounds")},
        }
        print(json.dumps(result, indent=2))
        return
    print(table(speeds, footprints, arguments.base))


if __name__ == "__main__":
    main()
