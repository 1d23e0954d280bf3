"""The linears of a block that read the same input: one Hessian, one activation scale, one transform for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from bdq_export.float_model import locate_linear
from bdq_models import Architecture, Dimensions


@dataclass(frozen=True)
class Site:
    """Linears that share their input.

    Attributes:
        layer: index of the block.
        paths: canonical absolute paths of the linears, in row order.
        module: the module of the torch model whose input it is.
    """

    layer: int
    paths: tuple[str, ...]
    module: str


def block_sites(architecture: Architecture, dimensions: Dimensions, layer: int) -> tuple[Site, ...]:
    """The sites of decoder layer `layer` in execution order."""
    shared = {path: group for _, group in architecture.residual_readers for path in group}
    sites: list[Site] = []
    done: set[str] = set()
    for path in architecture.linears:
        if path in done:
            continue
        group = shared.get(path, (path,))
        done.update(group)
        absolute = tuple(architecture.layer_path(layer, member) for member in group)
        sites.append(Site(layer, absolute, locate_linear(architecture, dimensions, absolute[0]).module))
    return tuple(sites)
