"""`bdq compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bdq_export.cli.model_commands import JsonOption, ThreadsOption
from bdq_export.comparison.methods import DEFAULT, METHODS, split_list
from bdq_export.errors import BdqError, UsageError
from bdq_export.options import MAX_SEED, ExportOptions

_DEFAULTS = ExportOptions()


def compare_command(
    model_dir: Annotated[str, typer.Argument(help="Hugging Face directory (safetensors), hub id, or .gguf file.")],
    out: Annotated[Path, typer.Option(help="Folder for compare.json and compare.md; a second run goes on from them.")],
    schemes: Annotated[
        list[str] | None, typer.Option(help="Bits, as of bdq export: w4a4kv4 w4a16.", show_default="w4a4kv4")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Some of {', '.join(METHODS)}. Options of bdq export may follow one: "
            "bdq-learned+loss=rce; write \\+ and \\, for a + and a comma inside of a value.",
            show_default=" ".join(DEFAULT),
        ),
    ] = None,
    seeds: Annotated[
        list[str] | None,
        typer.Option(help="Of every random choice; several give mean and spread.", show_default="0"),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text: perplexity, KL to the float model, top-1 agreement with it.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of a window.")] = 1024,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many windows.")] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="Zero-shot rows as JSON lines, a file a task.")] = None,
    calib: Annotated[
        str, typer.Option(help="UTF-8 text file, or self: text sampled from the model.")
    ] = _DEFAULTS.calib,
    calib_samples: Annotated[
        int | None,
        typer.Option(help="Calibration sequences; without it 24, or 128 where scales or rotations are learned."),
    ] = None,
    calib_seq_len: Annotated[
        int | None, typer.Option(help="Tokens in each, at most the model's context.", show_default="512 or the context")
    ] = None,
    threads: ThreadsOption = None,
    keep_exports: Annotated[bool, typer.Option("--keep-exports", help="Leave the models in OUT/exports.")] = False,
    as_json: JsonOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Export by many methods, schemes and seeds, and measure every file in the same way, in one table.

    Lists end at the next option: --schemes w4a4kv4 w4a16 --seeds 0 1 2; commas do too, but for tasks. Rows that OUT has
    with the same options are not measured again, those with other options are replaced once there are new figures,
    failed ones are tried again; another model, tokenizer, text or task is refused. Exit code 1 where every export of
    this run failed.
    """
    from bdq_export.cli.output import print_result
    from bdq_export.commands.compare import compare

    result = compare(
        model_dir,
        out,
        schemes=split_list(schemes or ("w4a4kv4",)),
        methods=split_list(methods or DEFAULT),
        seeds=[_seed(value) for value in split_list(seeds or ("0",))],
        text=text,
        seq_len=seq_len,
        max_windows=max_windows,
        tasks=tuple(tasks or ()),
        calib=calib,
        calib_samples=calib_samples,
        calib_seq_len=calib_seq_len,
        threads=threads,
        keep_exports=keep_exports,
        quiet=quiet,
    )
    print_result(result.to_dict(), result.render(), as_json)
    if result.all_failed:
        first = result.failed[0].error
        raise BdqError(f"none of the {len(result.measured)} exports of this run was measured; the first: {first}")


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise UsageError(f"seed is {text!r}, expected a number from 0 to {MAX_SEED}")
    return int(text)
