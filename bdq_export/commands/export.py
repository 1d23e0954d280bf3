"""`bdq export`: the stages of an export, in order, and nothing else.

open_checkpoint -> calibrate -> fold -> build_float_graph -> quantize_graph -> package -> verify
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdq_export import parallel
from bdq_export.errors import MissingDependencyError
from bdq_export.options import ExportOptions
from bdq_export.progress import Progress, make_progress

if TYPE_CHECKING:
    import onnx_ir as ir
    from rich.console import RenderableType
    from torch import Tensor
    from transformers import PreTrainedModel

    from bdq_export.calibration.result import CalibrationResult
    from bdq_export.checkpoint import Checkpoint
    from bdq_export.package.layout import Layout
    from bdq_export.preflight import Estimate
    from bdq_export.report.report import ExportReport
    from bdq_export.resume import ProgressStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote and measured.

    Attributes:
        paths: the written files, the model first; empty for a dry run, and in all but the first of several processes.
        metrics: figures by name: sizes, verification, estimate of a dry run.
        warnings: things that may go wrong.
    """

    paths: tuple[Path, ...]
    metrics: Mapping[str, Any]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON shows it."""
        return {
            "paths": [str(path) for path in self.paths],
            "metrics": dict(self.metrics),
            "warnings": list(self.warnings),
        }

    def render(self) -> RenderableType:
        """A table for people."""
        from rich.table import Table

        table = Table(show_header=False, box=None)
        table.add_column()
        table.add_column(overflow="fold")  # a long path must not lose its end
        if self.paths:
            table.add_row("model", str(self.paths[0]))
        for name, value in self.metrics.items():
            table.add_row(name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value))
        for warning in self.warnings:
            table.add_row("warning", warning)
        return table


def export(
    model_dir: str | Path,
    out: str | Path,
    *,
    force: bool = False,
    dump: Path | None = None,
    checkpoints: Path | None = None,
    low_memory: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> ExportResult:
    """Export a model directory to a low-bit ONNX model.

    Args:
        model_dir: Hugging Face directory (safetensors), hub id, or .gguf file.
        out: OUT.onnx, or a folder that will hold model.onnx.
        force: replace an earlier export.
        dump: folder for the text of the graph after each pass.
        checkpoints: folder for the progress of calibration; the same call goes on from there after a kill, and ends
            with the same bytes as without one.
        low_memory: hold the weights of one block at a time even where memory suffices for all; the same bytes, in more
            time.
        dry_run: check the input and estimate memory and disk only.
        quiet: no progress on stderr.
        progress: shows and records the stages, instead of the default one.
        options: the fields of `ExportOptions`, for example `scheme="w4a16"`.

    Raises:
        BdqError: see `bdq_export.errors`; nothing is left behind, except for a `VerificationError` of the written
            model, which is kept and marked.
    """
    return export_with(
        model_dir,
        Path(out),
        ExportOptions(**options),
        force=force,
        dump=dump,
        checkpoints=checkpoints,
        low_memory=low_memory,
        dry_run=dry_run,
        quiet=quiet,
        progress=progress,
    )


def export_with(
    model_dir: str | Path,
    out: Path,
    options: ExportOptions,
    *,
    force: bool = False,
    dump: Path | None = None,
    checkpoints: Path | None = None,
    low_memory: bool = False,
    dry_run: bool = False,
    quiet: bool = True,
    progress: Progress | None = None,
) -> ExportResult:
    """As `export`, with the options as one value."""
    require_packages()
    from bdq_export.checkpoint import open_checkpoint
    from bdq_export.package.layout import check_output
    from bdq_export.preflight import check_resources, check_separate
    from bdq_export.quantize.specs import check_cache, check_keep, check_rotation, with_sequence_length
    from bdq_export.quantize.target_bits import check_target
    from bdq_export.resume import NOWHERE, open_store
    from bdq_export.resume.fingerprint import fingerprint
    from bdq_export.system_errors import resource_errors, signals_as_exceptions

    with (
        parallel.data_parallel(),
        resource_errors(),
        signals_as_exceptions(),
        tempfile.TemporaryDirectory(prefix="bdq-export-") as work,
    ):
        progress = progress or make_progress(quiet or not parallel.is_first())
        check_separate(Path(model_dir), out)
        layout = check_output(out, force)
        with progress.stage("read model"):
            checkpoint = open_checkpoint(Path(model_dir), Path(work))
            options = with_sequence_length(options, checkpoint.dimensions)
            check_cache(options, checkpoint.dimensions)
            check_rotation(options, checkpoint.architecture)
            check_keep(options, checkpoint.architecture, checkpoint.dimensions)
            check_target(options, checkpoint.architecture, checkpoint.dimensions)
            need = check_resources(checkpoint, out, options, low_memory)
        parallel.wait()  # nobody looks at OUT any more when the first process begins to write
        if dry_run:
            return _estimated(checkpoint, need)
        store = NOWHERE
        if checkpoints is not None:
            with progress.stage("hash model"):
                identity = fingerprint(checkpoint, options) if parallel.is_first() else {}
            store = open_store(checkpoints, identity)
        return _export(checkpoint, layout, options, force, dump, store, progress, need.streamed)


def _export(
    checkpoint: Checkpoint,
    layout: Layout,
    options: ExportOptions,
    force: bool,
    dump: Path | None,
    store: ProgressStore,
    progress: Progress,
    streamed: bool,
) -> ExportResult:
    from bdq_export.calibrate import calibrate
    from bdq_export.float_model import load_float_model
    from bdq_export.pipeline import dump_to
    from bdq_export.preflight import existing_folder
    from bdq_export.process_memory import collecting_new_objects_only
    from bdq_export.scratch import Scratch
    from bdq_passes.storage import kept_by

    with collecting_new_objects_only():
        scratch = Scratch(existing_folder(layout.folder)) if streamed else None
        with progress.stage("load weights"):
            weights = checkpoint.weights() if scratch is None else checkpoint.lazy_weights(scratch)
            model = load_float_model(checkpoint, weights)
        calibration = calibrate(checkpoint, model, weights, options, progress, store)
        if not parallel.is_first():
            return ExportResult((), {})
        with kept_by(None if scratch is None else scratch.keep):
            graph = _build(checkpoint, calibration, model, weights, options, progress)
            with progress.stage("quantize graph"):
                _quantize(graph, checkpoint, calibration, options, dump_to(dump) if dump is not None else None)
        return _write(graph, checkpoint, calibration, model, layout, options, force, progress)


def _build(
    checkpoint: Checkpoint,
    calibration: CalibrationResult,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    options: ExportOptions,
    progress: Progress,
) -> ir.Model:
    """The float graph over the folded weights, compared with torch, which computes with `weights` again afterwards.

    Folded weights alone are another model where linears are to transform their inputs online: neither the graph nor
    torch does so here.
    """
    from bdq_export.builders import build_float_graph, check_float_graph
    from bdq_export.float_model import replace_weights
    from bdq_export.process_memory import give_back_memory

    with progress.stage("build float graph"):
        graph = build_float_graph(checkpoint, calibration.weights)
    with progress.stage("check float graph"):
        replace_weights(model, checkpoint.architecture, calibration.weights)
        error = check_float_graph(graph, model, checkpoint.dimensions, options.seed)
        logger.info("float graph equals torch: largest logit difference %.2g standard deviations", error)
        model.config.tie_word_embeddings = checkpoint.dimensions.tied  # a rotated lm_head untied it
        replace_weights(model, checkpoint.architecture, weights)
        give_back_memory()  # the session and its logits, and of lazy weights what was made of the last block
    return graph


def _quantize(
    graph: ir.Model,
    checkpoint: Checkpoint,
    calibration: CalibrationResult,
    options: ExportOptions,
    dump: Any,
) -> None:
    from bdq_export.pipeline import quantize_graph
    from bdq_export.quantization import Quantization

    quantization = Quantization(
        calibration.quantized,
        calibration.activation_ranges,
        calibration.activations,
        calibration.online,
        calibration.kv,
    )
    quantize_graph(graph, checkpoint.architecture, checkpoint.dimensions, quantization, options, dump)


def _write(
    graph: ir.Model,
    checkpoint: Checkpoint,
    calibration: CalibrationResult,
    model: PreTrainedModel,
    layout: Layout,
    options: ExportOptions,
    force: bool,
    progress: Progress,
) -> ExportResult:
    """Write, open again, compare with the float model, and put everything in place."""
    from bdq_export.commands.export_report import make_report, model_metadata
    from bdq_export.commands.graph_summary import bdq_operators
    from bdq_export.package.contents import write_documents, write_side_files
    from bdq_export.package.op_library import find_op_library
    from bdq_export.package.writer import staged_output
    from bdq_export.verify import torch_reference, verify

    inputs = [str(value.name) for value in graph.graph.inputs]
    library = find_op_library(*bdq_operators(graph))
    with staged_output(layout, force) as staged:
        with progress.stage("write"):
            model_metadata(graph, checkpoint, calibration, options).write(graph)
            staged.save_model(graph)
            write_side_files(staged, checkpoint, inputs, None if library is None else library.path)
        verification = verify(
            staged.onnx_path,
            torch_reference(model),
            calibration.held_back.numpy(),
            _min_top1(options),
            progress=progress,
        )
        report = make_report(graph, checkpoint, calibration, options, verification, progress, library)
        report = write_documents(staged, checkpoint, options, report, inputs)
        paths = staged.publish()
    verification.require()
    return ExportResult(paths, _metrics(report), report.warnings)


def _min_top1(options: ExportOptions) -> float:
    from bdq_export.quantize.target_bits import least_scheme
    from bdq_export.verify import default_min_top1

    return default_min_top1(least_scheme(options)) if options.min_top1 is None else options.min_top1


def _metrics(report: ExportReport) -> dict[str, Any]:
    verification = report.verification
    assert verification is not None, "an export is always verified"
    return {
        "scheme": report.scheme,
        "transform": report.transform,
        "executed_precision": report.executed_precision,
        "model_bytes": report.total_bytes,
        "bits_per_weight": report.bits_per_weight,
        "ppl_float": verification.ppl_float,
        "ppl_quantized": verification.ppl_quantized,
        "ppl_ratio": verification.ppl_ratio,
        "kl": verification.kl,
        "top1_agreement": verification.top1,
        "seconds": sum(stage.seconds for stage in report.stages),
        "peak_memory_bytes": max((stage.peak_bytes for stage in report.stages), default=0),
    }


def _estimated(checkpoint: Checkpoint, need: Estimate) -> ExportResult:
    return ExportResult(
        (),
        {
            "family": checkpoint.architecture.name,
            "parameters": checkpoint.parameters,
            **dataclasses.asdict(need),
        },
    )


def require_packages() -> None:
    """Make sure that what exporting needs is installed.

    Raises:
        MissingDependencyError: names what is missing.
    """
    import importlib.util

    needed = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "numba")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"exporting needs {', '.join(missing)}, not installed here; run: pip install 'bdq-export[export]'"
        )
