"""Speed of an exported folder against onnxruntime-genai's int4 model of the same checkpoint, in one run.

    python benchmarks/compare_genai.py OURS THEIRS [--prompt-len 512] [--new-tokens 64] [--threads 2] [--rounds 5]

Three contenders take turns, so that a change of the machine's load meets all of them: our folder through `bdq_runtime`,
our folder through onnxruntime-genai, and their folder through onnxruntime-genai. THEIRS comes from

    python -m onnxruntime_genai.models.builder -i MODEL_DIR -o THEIRS -p int4 -e cpu -c CACHE

Each has a process of its own: what one asks of the system (huge pages, for one) does nothing for the others. Prompts
are the same random tokens; decoding is greedy. A figure is the median over the rounds; the best round is given
too, since on a busy machine it says most. Needs `pip install onnxruntime-genai`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdq_runtime.bench import time_round
from bdq_runtime.folder import ModelFolder
from bdq_runtime.model import LanguageModel

Round = Callable[[], tuple[float, list[float]]]
"""Seconds of the prefill, and of each decode step."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of one contender: median over the rounds, and the best round."""

    prefill: float
    prefill_best: float
    decode: float
    decode_best: float


def in_own_process(open_round: Callable[..., Round], *arguments: Any) -> Round:
    """The round that `open_round(*arguments)` gives, opened and run in a process that lives as long as this one."""
    context = multiprocessing.get_context("spawn")  # a fork would share the parent's thread pools
    ours, theirs = context.Pipe()
    context.Process(target=_serve, args=(theirs, open_round, arguments), daemon=True).start()
    theirs.close()

    def ask() -> Any:
        try:
            return ours.recv()
        except EOFError:
            raise RuntimeError(f"{open_round.__name__} failed; its process says why above") from None

    ask()  # opened

    def run() -> tuple[float, list[float]]:
        ours.send(None)
        found: tuple[float, list[float]] = ask()
        return found

    return run


def _serve(pipe: Any, open_round: Callable[..., Round], arguments: Sequence[Any]) -> None:
    run = open_round(*arguments)
    pipe.send(None)
    with contextlib.suppress(EOFError):  # the parent is done
        while True:
            pipe.recv()
            pipe.send(run())


def with_bdq_runtime(folder: Path, prompt: np.ndarray, new_tokens: int, threads: int) -> Round:
    """A round of `folder` through our own loop."""
    model = LanguageModel(folder, threads=threads)
    return lambda: time_round(model, prompt, new_tokens)


def with_genai(folder: Path, prompt: np.ndarray, new_tokens: int, threads: int) -> Round:
    """A round of `folder` through onnxruntime-genai, with the same number of threads."""
    import onnxruntime_genai as og

    config = og.Config(str(folder))
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
    config.overlay(json.dumps(options))
    model = og.Model(config)

    def run() -> tuple[float, list[float]]:
        params = og.GeneratorParams(model)
        # An early end of the text would shorten the round.
        length = len(prompt) + new_tokens + 5
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(model, params)
        start = time.perf_counter()
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        prefill = time.perf_counter() - start
        steps = []
        for _ in range(new_tokens + 4):
            start = time.perf_counter()
            generator.generate_next_token()
            steps.append(time.perf_counter() - start)
        return prefill, steps[4:]

    return run


def compare(contenders: dict[str, Round], prompt_len: int, rounds: int) -> dict[str, Speed]:
    """Let the contenders take turns, after one round each to warm up."""
    prefills: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            prefill, decode = run()
            if number:
                prefills[name].append(prompt_len / prefill)
                steps[name].append(1 / statistics.median(decode))
    return {
        name: Speed(
            statistics.median(prefills[name]), max(prefills[name]), statistics.median(steps[name]), max(steps[name])
        )
        for name in contenders
    }


def ratios(speeds: dict[str, Speed], base: str) -> dict[str, dict[str, float]]:
    """Each contender's figures divided by those of `base`."""
    divisor = asdict(speeds[base])
    return {name: {key: value / divisor[key] for key, value in asdict(speed).items()} for name, speed in speeds.items()}


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ours", type=Path, help="a folder that bdq-export wrote (model.onnx)")
    parser.add_argument("theirs", type=Path, help="a folder that onnxruntime-genai's builder wrote")
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    vocab = int(ModelFolder.of(arguments.theirs).genai["vocab_size"])
    prompt = np.random.default_rng(0).integers(0, vocab, arguments.prompt_len)
    job = (prompt, arguments.new_tokens, arguments.threads)
    contenders = {
        "ours, bdq_runtime": in_own_process(with_bdq_runtime, arguments.ours, *job),
        "ours, genai": in_own_process(with_genai, ModelFolder.of(arguments.ours).directory, *job),
        "theirs, genai": in_own_process(with_genai, arguments.theirs, *job),
    }
    speeds = compare(contenders, arguments.prompt_len, arguments.rounds)
    relative = ratios(speeds, "theirs, genai")
    if arguments.json:
        result: dict[str, Any] = {name: asdict(speed) for name, speed in speeds.items()}
        print(json.dumps({"tokens_per_second": result, "ratio_to_theirs": relative, **settings(arguments)}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in settings(arguments).items()))
    heads = "".join(f"{head:>10}" for head in ("prefill", "best", "decode", "best"))
    print(f"{'tokens per second':20}{heads}   prefill, decode / theirs (best)")
    for name, speed in speeds.items():
        figures = "".join(f"{value:10.1f}" for value in asdict(speed).values())
        r = relative[name]
        print(
            f"{name:20}{figures}   {r['prefill']:.2f}, {r['decode']:.2f} "
            f"({r['prefill_best']:.2f}, {r['decode_best']:.2f})"
        )


def settings(arguments: argparse.Namespace) -> dict[str, int]:
    """The settings of the run, for its record."""
    return {key: getattr(arguments, key) for key in ("prompt_len", "new_tokens", "threads", "rounds")}


if __name__ == "__main__":
    main()
