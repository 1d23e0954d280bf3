"""What goes into the output folder beside the model, in the two moments when it can be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from bdq_export.options import ExportOptions
from bdq_export.package import config_file
from bdq_export.package.layout import REPORT_HTML, REPORT_JSON, UNVERIFIED
from bdq_export.package.model_card import model_card, source_licence
from bdq_export.package.side_files import side_files
from bdq_export.package.writer import StagedOutput
from bdq_export.report.html import report_html
from bdq_export.report.report import ExportReport

if TYPE_CHECKING:
    from bdq_export.checkpoint import Checkpoint


def write_side_files(
    staged: StagedOutput, checkpoint: Checkpoint, inputs: Collection[str], library: Path | None = None
) -> None:
    """Write what a program needs to run the model: tokenizer, configurations, op library. Call it before verification.

    Args:
        staged: the export being written.
        checkpoint: of the source model.
        inputs: input names of the graph.
        library: op library to copy beside the model.

    Raises:
        InvalidInputError: a file of the checkpoint is not readable as what its name says.
        ResourceError: the disk is full.
    """
    beside = None if library is None else library.name
    for name, content in side_files(checkpoint, staged.layout.onnx_name, inputs, beside).items():
        staged.write(name, content)
    if library is not None:
        staged.write(library.name, library.read_bytes())


def write_documents(
    staged: StagedOutput,
    checkpoint: Checkpoint,
    options: ExportOptions,
    report: ExportReport,
    inputs: Collection[str],
) -> ExportReport:
    """Write what people read: model card, options, report, and a mark when verification failed. Call it last.

    Returns:
        The report with the sizes of the files in it.

    Raises:
        ResourceError: the disk is full.
    """
    onnx_name = staged.layout.onnx_name
    report = dataclasses.replace(report, files=staged.sizes())
    licence = source_licence(checkpoint.directory)
    staged.write("README.md", model_card(report, onnx_name, inputs, checkpoint.config, licence))
    staged.write(config_file.NAME, config_file.dump_config(options))
    if report.verification is not None and not report.verified:
        staged.write(UNVERIFIED, _mark(report))
    report = dataclasses.replace(report, files=staged.sizes())
    staged.write(REPORT_JSON, report.to_json())
    staged.write(REPORT_HTML, report_html(report))
    return report


def _mark(report: ExportReport) -> bytes:
    """Text of the file that marks an export whose verification failed."""
    verification = report.verification
    assert verification is not None
    return (
        f"This model agrees with its float original on {verification.top1:.1%} of {verification.tokens} tokens; "
        f"at least {verification.threshold:.1%} was asked. Do not publish it. Figures: {REPORT_JSON}\n"
    ).encode()
