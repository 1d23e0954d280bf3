"""`bdq export` and `bdq-export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bdq_export import parallel
from bdq_export.errors import UsageError
from bdq_export.options import (
    BLOCK_SIZES,
    EFFORTS,
    KV_SCALES,
    LOSS_TARGETS,
    LOSSES,
    OPS,
    TRANSFORMS,
    WEIGHTS,
    ExportOptions,
    parse_block_size,
)

_DEFAULTS = ExportOptions()


def export_command(
    context: typer.Context,
    model_dir: Annotated[str, typer.Argument(help="Hugging Face directory (safetensors), hub id, or .gguf file.")],
    out: Annotated[Path, typer.Argument(help="OUT.onnx, or a folder that will hold model.onnx.")],
    scheme: Annotated[
        str,
        typer.Option(
            help="w<bits>a<bits>[kv<bits>], bits of weights, activations and KV cache: w4a16, w4a8, w4a4kv4, w3a3kv3, "
            "w2a4 and any other of w 2, 3, 4, 8, 16, a 3, 4, 8, 16 and kv 3, 4, 8."
        ),
    ] = _DEFAULTS.scheme,
    transform: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(TRANSFORMS)}; auto measures and keeps the best; spin learns rotations, kronecker "
            "FlatQuant's matrices."
        ),
    ] = _DEFAULTS.transform,
    weights: Annotated[str, typer.Option(help=f"{', '.join(WEIGHTS)}: how weights are rounded.")] = _DEFAULTS.weights,
    block_size: Annotated[
        str | None,
        typer.Option(
            help=f"Columns that share a scale: {', '.join(map(str, BLOCK_SIZES))} or channel (a whole row). Without it "
            "32; channel where bdq operators quantize activations for each token, and always with qdq and qlinear."
        ),
    ] = None,
    symmetric: Annotated[
        bool,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Without or with stored zero points (MatMulNBits' weights of 2 and 4 bits).",
        ),
    ] = _DEFAULTS.symmetric,
    activation_clip: Annotated[
        float | None,
        typer.Option(
            help="Where the grid of a token's activations ends, as part of its largest, at every site; 1 is no clip. "
            "Without it the clips of each site and of the cache are searched."
        ),
    ] = None,
    calib: Annotated[
        str, typer.Option(help="UTF-8 text file, or self: text sampled from the model.")
    ] = _DEFAULTS.calib,
    effort: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(EFFORTS)}: fast learns nothing; standard learns scales where activations have 4 "
            "bits or fewer or weights fewer than 4; best wherever weights are quantized, in more steps, and block by "
            "block before GPTQ where activations are rotated. With best, or "
            "where activations are quantized and scales learned, GPTQ weighs errors by what they do to the predictions."
        ),
    ] = _DEFAULTS.effort,
    loss: Annotated[
        str, typer.Option(help=f"{', '.join(LOSSES)}: what scales are learned by; kl is to the float model.")
    ] = _DEFAULTS.loss,
    loss_delta: Annotated[float, typer.Option(help="δ of the reverse losses.")] = _DEFAULTS.loss_delta,
    loss_target: Annotated[
        str, typer.Option(help=f"{', '.join(LOSS_TARGETS)}: what the reverse losses compare with.")
    ] = _DEFAULTS.loss_target,
    calib_samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration sequences, at least 2; without it 24, or 128 where scales or rotations are learned."
        ),
    ] = None,
    calib_seq_len: Annotated[
        int | None, typer.Option(help="Tokens in each, at most the model's context.", show_default="512 or the context")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = _DEFAULTS.seed,
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Average bits of the blocks' weights, such as 4.25: each site gets 2, 3 (bdq operators), 4 or 8, by "
            "measured sensitivity. Without it all have the bits of the scheme."
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="MODULE=BITS (glob, repeatable); 16 stays float: --keep 'model.layers.0.*=8'."),
    ] = None,
    ops: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(OPS)}: what computes the linears. auto is MatMulNBits wherever it expresses the scheme, "
            "else the bdq operators; qdq and qlinear are static w8a8."
        ),
    ] = _DEFAULTS.ops,
    kv_scales: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(KV_SCALES)}: of a quantized KV cache. dynamic: of each token and head, by bdq operators; "
            "static: of each channel, fixed by calibration, in the cache of ONNX Runtime's own attention (kv4, kv8), "
            "for texts about as long as --calib-seq-len."
        ),
    ] = _DEFAULTS.kv_scales,
    accuracy_level: Annotated[
        int, typer.Option(help="Of MatMulNBits alone: 4 multiplies in int8 (fast), 0 in float32.")
    ] = _DEFAULTS.accuracy_level,
    full_logits: Annotated[
        bool, typer.Option("--full-logits", help="Logits of all positions, not only the last.")
    ] = _DEFAULTS.full_logits,
    min_top1: Annotated[
        float | None, typer.Option(help="Smallest top-1 agreement with the float model that passes.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="bdq_config.json of an earlier export; flags given here win.")
    ] = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the progress of calibration: the same command goes on from there after a kill. Other "
            "options, another model or other text are refused (exit code 2). Reads the whole model once more."
        ),
    ] = None,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Hold the weights of one block at a time and the rest on disk. Done by itself where memory does not "
            "suffice for all; the same bytes, in more time.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and estimate only.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    dump: Annotated[Path | None, typer.Option(help="Folder for the graph's text after each pass.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Export MODEL_DIR to a low-bit ONNX model that ONNX Runtime and onnxruntime-genai open as it is."""
    from bdq_export.cli.output import print_result
    from bdq_export.commands.export import export_with
    from bdq_export.package.config_file import load_config

    given: dict[str, object] = {
        "scheme": scheme,
        "transform": transform,
        "weights": weights,
        "block_size": parse_block_size(block_size),
        "symmetric": symmetric,
        "activation_clip": activation_clip,
        "calib": calib,
        "effort": effort,
        "loss": loss,
        "loss_delta": loss_delta,
        "loss_target": loss_target,
        "calib_samples": calib_samples,
        "calib_seq_len": calib_seq_len,
        "seed": seed,
        "target_bits": target_bits,
        "keep": tuple(keep or ()),
        "ops": ops,
        "kv_scales": kv_scales,
        "accuracy_level": accuracy_level,
        "full_logits": full_logits,
        "min_top1": min_top1,
    }
    if config is not None:
        stored = load_config(config)
        given = {name: value if _is_given(context, name) else getattr(stored, name) for name, value in given.items()}
    if dry_run and dump is not None:
        raise UsageError("--dump has nothing to write in a --dry-run; leave one out")
    options = ExportOptions(**given)  # type: ignore[arg-type]
    with parallel.data_parallel():
        result = export_with(
            model_dir,
            out,
            options,
            force=force,
            dump=dump,
            checkpoints=checkpoints,
            low_memory=low_memory,
            dry_run=dry_run,
            quiet=quiet,
        )
        if parallel.is_first():
            print_result(result.to_dict(), result.render(), as_json)


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
