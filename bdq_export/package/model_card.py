"""The model card: README.md with the metadata that model hubs read."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bdq_export.options import STATIC
from bdq_export.package.template import render
from bdq_export.report.report import ExportReport

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE_LINE = re.compile(r"^(license|license_name|license_link):[ \t]*['\"]?([^'\"\n#]+?)['\"]?[ \t]*$", re.M)
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.S)
_LOGITS_TO_KEEP = "logits_to_keep"
_README_LIMIT = 1 << 20


def model_card(
    report: ExportReport,
    onnx_name: str,
    inputs: Collection[str],
    config: Mapping[str, Any],
    licence: Mapping[str, str],
) -> bytes:
    """The content of README.md; it holds no times, so the same export gives the same bytes.

    Args:
        report: of this export.
        onnx_name: file name of the model.
        inputs: input names of the graph.
        config: the checkpoint's config.json, for the hub id it may name.
        licence: see `source_licence`.
    """
    base = config.get("_name_or_path")
    block = report.options.get("block_size")
    front: dict[str, Any] = dict(licence)
    if isinstance(base, str) and _HUB_ID.fullmatch(base):
        front["base_model"] = base
    front |= {
        "base_model_relation": "quantized",
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime", "bdq-export", report.scheme],
    }
    text = render(
        "bdq_export.package",
        "model_card.md.jinja",
        report=report,
        # a JSON string is a YAML string, whatever characters it has
        front_matter=[(key, json.dumps(value, ensure_ascii=False)) for key, value in front.items()],
        block="one scale per output channel" if not block else f"blocks of {block}",
        calibration=_calibration(report.options),
        run_path="." if onnx_name == "model.onnx" else onnx_name,
        inputs=[name for name in inputs if not name.startswith(("past_key_values.", _LOGITS_TO_KEEP))],
        counts_logits=_LOGITS_TO_KEEP in inputs,
        onnx_name=onnx_name,
        static_cache=report.options.get("kv_scales") == STATIC,
        quantized_cache=any(name.endswith("KVAttention") for name in report.operators),
    )
    return text.encode()


def source_licence(directory: Path) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the source's model card; empty when it has none."""
    card = directory / "README.md"
    if not card.is_file() or card.stat().st_size > _README_LIMIT:
        return {}
    matter = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    return dict(_LICENSE_LINE.findall(matter[1])) if matter else {}


def _calibration(options: Mapping[str, Any]) -> str:
    source = options.get("calib", "self")
    size = f"{options.get('calib_samples')} sequences of {options.get('calib_seq_len')} tokens"
    if source == "self":
        return f"{size} sampled from the model itself"
    return f"{size} of a text file"
