"""bdq_report.json and report.html: stable, complete, and free of surprises."""

from __future__ import annotations

import dataclasses
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from bdq_export.options import ExportOptions
from bdq_export.progress import StageCost
from bdq_export.report.html import report_html
from bdq_export.report.report import BitChoice, Candidate, ExportReport, SiteBits, SiteFlatness, WeightError
from bdq_export.report.weight_error import sqnr_db, weight_errors
from bdq_export.verify import Verification
from bdq_runtime.packing import PerBlock, QuantizedWeight, QuantSpec


@pytest.fixture
def report() -> ExportReport:
    sites = ("attention_input", "value", "mlp_input")
    modules = ("self_attn.q_proj", "mlp.down_proj")
    return ExportReport(
        version="0.1.0",
        model="<script>alert(1)</script>",
        family="llama",
        scheme="w4a16",
        transform="bdq",
        executed_precision="float32",
        source_hash="ab" * 32,
        options=dataclasses.asdict(ExportOptions()),
        parameters=2_000_000,
        weight_bytes=1_300_000,
        source_bytes=8_000_000,
        files={"out.onnx": 1000, "out.onnx.data": 1_300_000, "config.json": 700},
        stages=(StageCost("gptq", 12.345678, 2 << 30), StageCost("verify", 1.0, 1 << 30)),
        candidates=(Candidate("none", 0.5, False), Candidate("bdq", 0.25, True)),
        flatness=tuple(SiteFlatness(layer, site, 2.0, 0.5) for site in sites for layer in range(3)),
        weight_errors=tuple(WeightError(f"model.layers.{i}.{m}", 4, 20.0 + i) for i in range(3) for m in modules),
        verification=Verification(0.0123, 0.91, 10.0, 10.5, 510, 0.7),
        notes=("tied embeddings were untied",),
        warnings=("calibrated on little text",),
        versions={"onnxruntime": "1.31.1"},
    )


def test_json_has_everything_in_a_stable_order(report: ExportReport) -> None:
    body = json.loads(report.to_json())
    assert list(body)[:2] == ["format", "verified"]
    assert {field.name for field in dataclasses.fields(report)} <= set(body)
    assert body["bits_per_weight"] == 5.2
    assert body["verification"]["passed"] is True
    assert body["stages"][0] == {"name": "gptq", "seconds": 12.3457, "peak_bytes": 2 << 30}
    assert report.to_json() == dataclasses.replace(report).to_json()


def test_json_has_no_nan(report: ExportReport) -> None:
    broken = dataclasses.replace(report, verification=Verification(float("nan"), 0.9, 1.0, float("inf"), 5, 0.7))
    body = json.loads(broken.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert body["verification"]["kl"] is None
    assert body["verified"] is False


def test_derived_figures(report: ExportReport) -> None:
    assert report.total_bytes == 1_301_000
    assert report.bits_per_weight == 5.2
    assert dataclasses.replace(report, parameters=0).bits_per_weight == 0.0


def test_html_shows_the_figures_and_escapes(report: ExportReport) -> None:
    page = report_html(report).decode()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    for text in (
        "verified",
        "1.050×",
        "91.0 %",
        "0.0123",
        "5.20",
        "12.3",
        "tied embeddings",
        "little text",
        "down_proj",
    ):
        assert text in page
    assert 'class="chosen"><td>bdq' in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page


def test_html_is_reproducible_with_unique_ids(report: ExportReport) -> None:
    first, second = report_html(report), report_html(report)
    assert first == second
    page = first.decode()
    drawings = [part.split("</svg>")[0] + "</svg>" for part in page.split("<svg")[1:]]
    assert len(drawings) == 2
    ids: list[str] = []
    for drawing in drawings:
        root = ET.fromstring("<svg" + drawing)
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        for element in root.iter():
            for value in element.attrib.values():
                if value.startswith("url(#"):
                    assert value[5:-1] in ids or f'id="{value[5:-1]}"' in drawing
    assert len(ids) == len(set(ids))


def test_html_of_an_export_without_calibration(report: ExportReport) -> None:
    bare = dataclasses.replace(
        report, candidates=(), flatness=(), weight_errors=(), stages=(), verification=None, notes=(), warnings=()
    )
    page = report_html(bare).decode()
    assert "<svg" not in page
    assert "not run" in page


def test_html_of_a_failed_verification(report: ExportReport) -> None:
    failed = dataclasses.replace(report, verification=Verification(3.0, 0.1, 10.0, 90.0, 510, 0.7))
    assert "below threshold" in report_html(failed).decode()


def test_sqnr() -> None:
    weight = np.array([[3.0, 4.0]])
    assert sqnr_db(weight, np.array([[3.0, 4.5]])) == pytest.approx(20.0)
    assert sqnr_db(weight, weight) == 200.0
    assert sqnr_db(weight * 0, weight) == -200.0


def test_weight_errors_see_a_wrong_scale() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 64)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.0, (4, 2)).astype(np.float32)
    spec = QuantSpec(4, PerBlock(32))
    right = QuantizedWeight(codes, scales, None, spec)
    wrong = QuantizedWeight(codes, scales * np.float32(1.01), None, spec)
    float_weights = {"model.layers.0.mlp.up_proj.weight": right.dequantize()}
    (error,) = weight_errors(float_weights, {"model.layers.0.mlp.up_proj.weight": right})
    assert error == WeightError("model.layers.0.mlp.up_proj", 4, 200.0)
    (error,) = weight_errors(float_weights, {"model.layers.0.mlp.up_proj.weight": wrong})
    assert error.sqnr_db == pytest.approx(40.0, abs=0.01)


def test_html_and_json_show_the_bits_of_each_site(report: ExportReport) -> None:
    losses = {2: 0.5, 4: 0.25, 8: 0.001}
    sites = tuple(
        SiteBits(layer, f"model.layers.{layer}.mlp.{role}", (f"model.layers.{layer}.mlp.{role}",), 100, bits, losses)
        for layer, role, bits in ((0, "gate_proj", 8), (0, "down_proj", 4), (1, "gate_proj", 2), (1, "down_proj", 4))
    )
    choice = BitChoice(4.6, 4.5, sites, {"model.layers.0.self_attn.q_proj": 8})
    assert choice.predicted_loss == 1.001
    chosen = dataclasses.replace(report, bits=choice)
    body = json.loads(chosen.to_json())["bits"]
    assert (body["target"], body["average"]) == (4.6, 4.5)
    assert [site["bits"] for site in body["sites"]] == [8, 4, 2, 4]
    assert body["sites"][2]["losses"] == {"2": 0.5, "4": 0.25, "8": 0.001}
    page = report_html(chosen).decode()
    drawing = page.split("Bits of the weights</h2>")[1].split("</section>")[0]
    for text in ("4.500 on average", "4.6 were asked for", "1 nats", "1 linears were fixed", ">gate_proj<", ">8<"):
        assert text in drawing
    assert "Bits of the weights" not in report_html(report).decode()
