"""What an export says of itself: the report, and the metadata inside the model."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import bdq_export
from bdq_export.options import MATMULNBITS, ExportOptions
from bdq_export.package.metadata import ModelMetadata
from bdq_export.progress import Progress
from bdq_export.report.report import ExportReport
from bdq_export.report.weight_error import weight_errors
from bdq_export.verify import Verification

if TYPE_CHECKING:
    import onnx_ir as ir

    from bdq_export.calibrate import CalibrationResult
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
    )


def executed_precision(graph: ir.Model) -> str:
    """What the kernels of the linears really multiply in, for example "w4a8 x150, w8a8 x1"."""
    from bdq_passes import annotations

    counts: dict[str, int] = {}
    for node in annotations.with_role(graph, annotations.LINEAR):
        spec = annotations.spec(node)
        if spec is None:
            name = "float32"
        else:
            static = annotations.has_static_activations(node)
            int8 = static or annotations.executed(node) == "int8"
            name = f"w{spec.bits}a{'8' if int8 else '32'}" + (" static" if static else "")
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} in {count} linears" for name, count in sorted(counts.items()))


def make_report(
    graph: ir.Model,
    checkpoint: Checkpoint,
    calibration: CalibrationResult,
    options: ExportOptions,
    verification: Verification,
    progress: Progress,
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
        options={**asdict(options), "block_size": options.scale_block, "ops": options.linear_ops},
        parameters=checkpoint.parameters,
        weight_bytes=_weight_bytes(graph),
        source_bytes=sum(path.stat().st_size for path in checkpoint.files),
        stages=progress.stages(),
        candidates=calibration.candidates,
        flatness=calibration.activation_flatness,
        weight_flatness=calibration.weight_flatness,
        weight_errors=weight_errors(calibration.weights, calibration.quantized),
        verification=verification,
        notes=_notes(checkpoint, calibration, options),
        warnings=calibration.warnings,
        versions={name: _version(name) for name in _LIBRARIES},
    )


def _notes(checkpoint: Checkpoint, calibration: CalibrationResult, options: ExportOptions) -> tuple[str, ...]:
    notes = [calibration.reason]
    if checkpoint.dimensions.tied:
        untied = f"{checkpoint.architecture.lm_head}.weight" in calibration.weights
        notes.append(
            "embedding and lm_head were tied; the rotation unties them, so both are stored"
            if untied
            else "embedding and lm_head are tied: one quantized table serves both"
        )
    if options.linear_ops == MATMULNBITS and options.accuracy_level == 4:
        notes.append("MatMulNBits at accuracy level 4 rounds activations to int8 inside the kernel")
    return tuple(notes)


def _weight_bytes(graph: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in graph.graph.initializers.values() if value.const_value is not None)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
