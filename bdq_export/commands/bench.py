"""`bdq bench`: prefill and decode speed, load time and memory of an exported model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table

from bdq_export.commands.runtime_errors import invalid_input, require_at_least


@dataclass(frozen=True)
class BenchResult:
    """Speed of a model on this machine.

    Attributes:
        model: the ONNX file.
        prompt_len: tokens of the prompt.
        new_tokens: decode steps timed.
        threads: as asked; None is one for each core.
        load_seconds: opening the file.
        prefill_tokens_per_second: median of three prompts, after one to warm up.
        decode_tokens_per_second: of the median step.
        time_to_first_token_seconds: median prefill.
        peak_rss_bytes: largest resident set of the process; None where the system does not say.
        shares_cache: whether the KV cache is written in place.
        provider: execution provider of ONNX Runtime.
    """

    model: str
    prompt_len: int
    new_tokens: int
    threads: int | None
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token_seconds: float
    peak_rss_bytes: int | None
    shares_cache: bool
    provider: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)


def bench(model: str | Path, prompt_len: int = 512, new_tokens: int = 64, threads: int | None = None) -> BenchResult:
    """Time `model` on random tokens, greedily continued.

    Args:
        model: `OUT.onnx`, or a folder that holds `model.onnx`.
        prompt_len: tokens of the prompt.
        new_tokens: decode steps to time.
        threads: CPU threads; None for all cores.

    Raises:
        UsageError: an option below 1.
        InvalidInputError: no such model, a file ONNX Runtime cannot open, or more tokens than its context.
    """
    for name, value in (("--prompt-len", prompt_len), ("--new-tokens", new_tokens), ("--threads", threads)):
        require_at_least(name, value, 1)
    from bdq_runtime.bench import measure_speed
    from bdq_runtime.folder import ModelFolder

    with invalid_input():
        path = ModelFolder.of(model).model
        found = measure_speed(path, prompt_len, new_tokens, threads)
    return BenchResult(
        str(path),
        prompt_len,
        new_tokens,
        threads,
        found.load_seconds,
        found.prefill_tokens_per_second,
        found.decode_tokens_per_second,
        found.time_to_first_token_seconds,
        found.peak_rss_bytes,
        found.shares_cache,
        found.provider,
    )


def render(result: BenchResult) -> RenderableType:
    """A table for a terminal."""
    table = Table(title=result.model, show_header=False, title_justify="left")
    memory = "unknown" if result.peak_rss_bytes is None else f"{result.peak_rss_bytes / 1e6:,.0f} MB"
    for name, value in (
        (f"prefill of {result.prompt_len} tokens", f"{result.prefill_tokens_per_second:,.1f} tokens/s"),
        (f"decode, {result.new_tokens} steps", f"{result.decode_tokens_per_second:,.1f} tokens/s"),
        ("time to first token", f"{result.time_to_first_token_seconds:.3f} s"),
        ("load", f"{result.load_seconds:.2f} s"),
        ("peak memory of the process", memory),
        ("threads", "all cores" if result.threads is None else str(result.threads)),
        ("KV cache", "written in place" if result.shares_cache else "copied at each step"),
        ("provider", result.provider),
    ):
        table.add_row(name, value)
    return table
