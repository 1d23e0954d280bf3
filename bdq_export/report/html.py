"""`report.html`: one page, no scripts, nothing fetched from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from bdq_export.package.template import render
from bdq_export.report.charts import bits_chart, flatness_chart, sqnr_chart
from bdq_export.report.report import ExportReport

_WORST = 10


def report_html(report: ExportReport) -> bytes:
    """The content of `report.html`."""
    from markupsafe import Markup

    # ids are unique within one drawing only; the page holds several
    charts = {
        "flatness_svg": Markup(_prefixed(flatness_chart(report.flatness), "f")),
        "weight_flatness_svg": Markup(_prefixed(flatness_chart(report.weight_flatness), "w")),
        "bits_svg": Markup(_prefixed(bits_chart(report.bits), "b")),
        "sqnr_svg": Markup(_prefixed(sqnr_chart(report.weight_errors), "s")),
    }
    worst = sorted(report.weight_errors, key=lambda error: error.sqnr_db)[:_WORST]
    text = render(
        "bdq_export.report",
        "report.html.jinja",
        report=report,
        seconds=sum(stage.seconds for stage in report.stages),
        longest=max((stage.seconds for stage in report.stages), default=0.0),
        peak=max((stage.peak_bytes for stage in report.stages), default=0),
        worst=worst,
        options=_lines(report.options.items()),
        mean_before=_mean(entry.before for entry in report.flatness),
        mean_after=_mean(entry.after for entry in report.flatness),
        **charts,
    )
    return text.encode()


def _prefixed(svg: str, prefix: str) -> str:
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'((?:xlink:href|href)="|url\()#', rf"\g<1>#{prefix}-", svg)


def _lines(items: Iterable[tuple[str, Any]]) -> list[tuple[str, str]]:
    def text(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(str, value)) or "none"
        return "default" if value is None else str(value)

    return [(key.replace("_", "-"), text(value)) for key, value in items]


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None
