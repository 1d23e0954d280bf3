"""Charts of the report, as SVG text that goes into the page.

Written without dates and with fixed element ids, so that the same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bdq_export.report.report import BitChoice, SiteFlatness, WeightError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#65a30d", "#dc2626")
_BEFORE, _AFTER = "#b6bdc9", "#2563eb"
_STYLE: Any = {
    "svg.hashsalt": "bdq-export",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "axes.edgecolor": "#d5dae1",
    "axes.labelcolor": "#4a5361",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": "#1c2430",
    "xtick.color": "#6b7482",
    "ytick.color": "#6b7482",
    "grid.color": "#eceff3",
}
_SHADES = {2: "#dbe5fb", 3: "#93b4f5", 4: "#2563eb", 8: "#173a8a"}
_LAYER = re.compile(r"\.(\d+)\.(.+)$")
_COLUMNS = 2


def flatness_chart(flatness: Sequence[SiteFlatness]) -> str:
    """One panel a site: flatness by layer before and after the transform; empty text without data."""
    if not flatness:
        return ""
    sites = list(dict.fromkeys(entry.site for entry in flatness))
    rows = -(-len(sites) // _COLUMNS)
    figure, panels = _figure(rows, min(_COLUMNS, len(sites)), height=2.1 * rows + 0.3)
    for panel, site in zip(panels, sites, strict=False):
        entries = sorted((e for e in flatness if e.site == site), key=lambda e: e.layer)
        layers = [entry.layer for entry in entries]
        before, after = [entry.before for entry in entries], [entry.after for entry in entries]
        panel.fill_between(layers, before, after, color=_AFTER, alpha=0.07, linewidth=0)
        panel.plot(layers, before, color=_BEFORE, linewidth=2, marker="o", markersize=3, label="before")
        panel.plot(layers, after, color=_AFTER, linewidth=2, marker="o", markersize=3, label="after")
        panel.set_title(site.replace("_", " "), loc="left", fontsize=10, fontweight="bold")
        panel.set_ylim(bottom=0)
        _axes(panel, "layer", "flatness")
    for panel in panels[len(sites) :]:
        panel.set_visible(False)
    panels[0].legend(frameon=False, ncols=2, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.98))
    return _svg(figure)


def sqnr_chart(errors: Sequence[WeightError]) -> str:
    """Signal to noise of every decoder weight by layer, one line a module; empty text without data."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for error in errors:
        match = _LAYER.search(error.module)
        if match:
            lines.setdefault(match[2].split(".")[-1], []).append((int(match[1]), error.sqnr_db))
    if not lines:
        return ""
    figure, (panel,) = _figure(1, 1, height=3.2)
    for index, (name, points) in enumerate(lines.items()):
        layers, values = zip(*sorted(points), strict=True)
        colour = _COLOURS[index % len(_COLOURS)]
        panel.plot(layers, values, color=colour, linewidth=1.6, marker="o", markersize=3, label=name)
    _axes(panel, "layer", "SQNR (dB)")
    panel.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _svg(figure)


def bits_chart(choice: BitChoice | None) -> str:
    """A cell for each site and layer, darker with more bits, its number in it; empty text without a choice."""
    if choice is None or not choice.sites:
        return ""
    from matplotlib.patches import Rectangle

    roles = list(dict.fromkeys(_role(site.site) for site in choice.sites))
    figure, (panel,) = _figure(1, 1, height=0.36 * len(roles) + 0.9)
    for site in choice.sites:
        row = roles.index(_role(site.site))
        panel.add_patch(Rectangle((site.layer - 0.46, row - 0.42), 0.92, 0.84, color=_SHADES[site.bits]))
        ink = "#ffffff" if site.bits > 3 else "#1c2430"
        panel.text(site.layer, row, str(site.bits), color=ink, fontsize=8, ha="center", va="center")
    panel.set_xlim(-0.6, max(site.layer for site in choice.sites) + 0.6)
    panel.set_ylim(len(roles) - 0.4, -0.6)
    panel.set_yticks(range(len(roles)), roles)
    _axes(panel, "layer", "")
    panel.grid(visible=False)
    return _svg(figure)


def _role(module: str) -> str:
    return module.rpartition(".")[2]


def _figure(rows: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        # a Figure without pyplot: no window system, no global state, nothing to close
        figure = Figure(figsize=(9.2, height), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False)
    return figure, list(panels.flat)


def _axes(panel: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(visible=True, axis="y")
    panel.set_axisbelow(True)


def _svg(figure: Figure) -> str:
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(
            target, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = target.getvalue()
    return text[text.index("<svg") :]
