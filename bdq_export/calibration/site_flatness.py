"""Flatness of every site before and after the transforms, for the report."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdq_export.calibration.candidates import Statistics
from bdq_export.calibration.sites import Site, block_sites
from bdq_export.calibration.workspace import Workspace
from bdq_export.report.report import SiteFlatness
from bdq_export.transform import flatness

_ROWS = 8
"""Every so many rows of a weight are looked at: the figure is an average over millions of entries."""


def activation_flatness(space: Workspace, before: Statistics, after: Mapping[str, float]) -> tuple[SiteFlatness, ...]:
    """Flatness of the inputs of each site.

    Args:
        space: the model's family and sizes.
        before: statistics of the float model.
        after: module of a site -> flatness of its inputs in the transformed model; empty where it was not observed.
    """
    return tuple(
        SiteFlatness(site.layer, _name(space, site), before[site.paths[0]].flatness, after[site.module])
        for site in _sites(space)
        if site.module in after
    )


def weight_flatness(space: Workspace, after: Mapping[str, Tensor]) -> tuple[SiteFlatness, ...]:
    """Flatness of the stacked weights of each site, before and after folding."""
    return tuple(
        SiteFlatness(site.layer, _name(space, site), _stacked(site, space.weights), _stacked(site, after))
        for site in _sites(space)
    )


def _sites(space: Workspace) -> list[Site]:
    layers = range(space.dimensions.layers)
    return [site for layer in layers for site in block_sites(space.architecture, space.dimensions, layer)]


def _name(space: Workspace, site: Site) -> str:
    """The edge that ends at the site."""
    prefix = space.architecture.layer_path(site.layer, "")
    first = site.paths[0].removeprefix(prefix)
    for edge in space.architecture.edges:
        if first in edge.consumers and edge.consumer_side.value == "input":
            return edge.name
    return first


def _stacked(site: Site, weights: Mapping[str, Tensor]) -> float:
    rows = torch.cat([weights[f"{path}.weight"][::_ROWS] for path in site.paths])
    return flatness(rows) if bool(rows.any()) else 0.0
