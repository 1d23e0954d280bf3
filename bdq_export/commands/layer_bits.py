"""Bits of the weights of each linear of an ONNX graph, as a table of layers where they differ."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from bdq_export.commands.precisions import node_precisions

if TYPE_CHECKING:
    from onnx import GraphProto

_LAYER = re.compile(r"\.(\d+)\.(.+)$")


def linear_bits(graph: GraphProto) -> dict[str, int]:
    """Name of each linear node -> bits of its weights; 16 and more are float."""
    return {name: bits for name, (_, bits, *_) in node_precisions(graph)}


def layer_table(bits: Mapping[str, int]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and rows that show `bits` by layer; both empty where all layers are of the same bits.

    Neighbouring layers of equal bits share a row, such as "3-7".
    """
    layers: dict[int, dict[str, int]] = {}
    for name, value in bits.items():
        if match := _LAYER.search(name):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    if len({value for layer in layers.values() for value in layer.values()}) < 2:
        return (), []
    roles = tuple(dict.fromkeys(role for layer in layers.values() for role in layer))
    cells = {layer: tuple(str(found.get(role, "-")) for role in roles) for layer, found in sorted(layers.items())}
    rows = []
    for values, group in groupby(cells, key=cells.__getitem__):
        members = list(group)
        label = str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}"
        rows.append((label, *values))
    return ("layers", *(role.rpartition(".")[2] for role in roles)), rows
