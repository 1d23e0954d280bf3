"""What is said of ONNX Runtime's 8-bit products, and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from bdq_export import export
from bdq_export.commands import export_report
from bdq_export.integer_products import saturates


@pytest.mark.parametrize(("largest", "expected"), [(255 * 127 * 64, False), (32767 * 32, True)])
def test_it_is_asked_of_onnx_runtime(monkeypatch: pytest.MonkeyPatch, largest: int, expected: bool) -> None:
    assert saturates() in (False, True)  # it runs here
    session = SimpleNamespace(run=lambda _outputs, _feeds: [np.full((1, 16), largest, np.int32)])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_args, **_kwargs: session)
    assert saturates() is expected


@pytest.mark.parametrize(
    ("ops", "saturated", "warned"), [("qdq", True, True), ("qdq", False, False), ("auto", True, False)]
)
def test_static_exports_say_so(
    ops: str,
    saturated: bool,
    warned: bool,
    model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_report, "saturates", lambda: saturated)
    options: dict[str, Any] = {"calib_samples": 4, "calib_seq_len": 32, "min_top1": 0.0, "transform": "smooth"}
    result = export(model_dir("llama"), tmp_path / "out", scheme="w8a8", ops=ops, weights="rtn", **options)
    assert any("saturates" in warning for warning in result.warnings) is warned
