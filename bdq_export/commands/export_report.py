"""What an export says of itself: the report, and the metadata inside the model."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import bdq_export
from bdq_export.commands.graph_summary import bdq_operators, executed_precision
from bdq_export.integer_products import saturates
from bdq_export.options import ExportOptions
from bdq_export.package.metadata import ModelMetadata
from bdq_export.package.op_library import OpLibrary
from bdq_export.progress import Progress
from bdq_export.report.report import ExportReport
from bdq_export.report.weight_error import weight_errors
from bdq_export.verify import Verification

if TYPE_CHECKING:
    import onnx_ir as ir

    from bdq_export.calibration.result import CalibrationResult
    from bdq_export.checkpoint import Checkpoint

_LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "mobius-onnx", "numpy")


def model_metadata(
    graph: ir.Model, checkpoint: Checkpoint, calibration: CalibrationResult, options: ExportOptions
) -> ModelMetadata:
    """The `metadata_props` of the exported model."""
    return ModelMetadata(
        version=bdq_export.__version__,
        scheme=options.scheme,
        seed=options.seed,
        source_hash=checkpoint.source_hash,
        executed_precision=executed_precision(graph),
        transform=calibration.transform,
        family=checkpoint.architecture.name,
        average_bits=None if calibration.bits is None else round(calibration.bits.average, 4),
        operators_version=bdq_operators(graph)[1] or None,
    )


def make_report(
    graph: ir.Model,
    checkpoint: Checkpoint,
    calibration: CalibrationResult,
    options: ExportOptions,
    verification: Verification,
    progress: Progress,
    library: OpLibrary | None = None,
) -> ExportReport:
    """Everything worth knowing about one export, but for the sizes of files."""
    return ExportReport(
        version=bdq_export.__version__,
        model=checkpoint.directory.name,
        family=checkpoint.architecture.name,
        scheme=options.scheme,
        transform=calibration.transform,
        executed_precision=executed_precision(graph),
        source_hash=checkpoint.source_hash,
        options={
            **asdict(options),
            "block_size": options.scale_block,
            "ops": options.linear_ops,
            "calib_samples": options.samples,
            "calib_seq_len": options.seq_len,
        },
        parameters=checkpoint.parameters,
        weight_bytes=_weight_bytes(graph),
        source_bytes=sum(path.stat().st_size for path in checkpoint.files),
        stages=progress.stages(),
        candidates=calibration.candidates,
        flatness=calibration.activation_flatness,
        weight_flatness=calibration.weight_flatness,
        weight_errors=weight_errors(calibration.weights, calibration.quantized),
        bits=calibration.bits,
        verification=verification,
        notes=_notes(checkpoint, calibration, options, graph),
        warnings=(*calibration.warnings, *_library_warnings(library), *_saturation_warnings(options)),
        operators=() if library is None else library.operators,
        op_library=None if library is None else library.name,
        op_library_platform=None if library is None or library.path is None else library.platform,
        versions={name: _version(name) for name in _LIBRARIES},
    )


def _notes(
    checkpoint: Checkpoint, calibration: CalibrationResult, options: ExportOptions, graph: ir.Model
) -> tuple[str, ...]:
    notes = [calibration.reason]
    if checkpoint.dimensions.tied:
        untied = f"{checkpoint.architecture.lm_head}.weight" in calibration.weights
        notes.append(
            "embedding and lm_head were tied; the rotation unties them, so both are stored"
            if untied
            else "embedding and lm_head are tied: one quantized table serves both"
        )
    if calibration.learned is not None:
        learned = calibration.learned
        notes.append(
            f"scales, diagonals and clips were learned end to end in {learned.steps} steps: held-out loss "
            f"{learned.after:.4f} nats, {learned.before:.4f} before"
            + ("" if learned.kept else "; that is not less, so nothing of it was kept")
        )
    if calibration.bits is not None:
        notes.append(
            f"weights of the blocks have {calibration.bits.average:.3f} bits on average, chosen for each site by the "
            f"loss that rounding it costs; {calibration.bits.target:g} were asked for"
        )
    rounds = options.accuracy_level == 4 and any(node.op_type == "MatMulNBits" for node in graph.graph)
    if rounds:
        notes.append("MatMulNBits at accuracy level 4 rounds activations to int8 inside the kernel")
    return tuple(notes)


def _library_warnings(library: OpLibrary | None) -> tuple[str, ...]:
    if library is None or library.path is not None:
        return ()
    return (f"no op library lies beside the model ({library.reason}); it runs on standard operators, which is slower",)


def _saturation_warnings(options: ExportOptions) -> tuple[str, ...]:
    if not options.is_static or not saturates():
        return ()
    return (
        "ONNX Runtime saturates sums of static w8a8 on this processor (x86 without VNNI): the measured figures are of "
        "that, and other processors compute the file better",
    )


def _weight_bytes(graph: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
