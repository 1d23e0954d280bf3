"""`bdq eval`, `bdq run`, `bdq bench` and `bdq inspect`: they need no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[Path, typer.Argument(help="OUT.onnx, or a folder that holds model.onnx.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; all cores by default.")]


def eval_command(
    model: ModelArgument,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text: perplexity in windows of --seq-len.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a window of the text.", show_default="1024")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows of the text.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="MODEL_DIR: adds the float model's perplexity, KL and top-1 agreement.")
    ] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="Zero-shot rows as JSON lines (repeatable).")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Perplexity of a text and zero-shot accuracy, measured on the exported file itself."""
    from bdq_export.cli.output import print_result
    from bdq_export.commands import evaluate
    from bdq_export.progress import make_progress

    result = evaluate.evaluate(
        model,
        text=text,
        seq_len=seq_len,
        max_windows=max_windows,
        reference=reference,
        tasks=tuple(tasks or ()),
        threads=threads,
        progress=make_progress(quiet),
    )
    print_result(result.to_dict(), evaluate.render(result), as_json)


def run_command(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="What the model continues or, with --chat, answers.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Generate text; tokens are printed as they come."""
    from bdq_export.commands import run

    for piece in run.stream(
        model,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        threads=threads,
    ):
        print(piece, end="", flush=True)
    print()


def bench_command(
    model: ModelArgument,
    prompt_len: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prefill and decode speed, load time and peak memory."""
    from bdq_export.cli.output import print_result
    from bdq_export.commands import bench

    result = bench.bench(model, prompt_len=prompt_len, new_tokens=new_tokens, threads=threads)
    print_result(result.to_dict(), bench.render(result), as_json)


def inspect_command(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Scheme, sizes, operators and the precision that is really executed."""
    from bdq_export.cli.output import print_result
    from bdq_export.commands import inspect

    result = inspect.inspect(model)
    print_result(result.to_dict(), inspect.render(result), as_json)
