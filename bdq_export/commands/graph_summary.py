"""What a finished graph computes with, in words."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def bdq_operators(graph: ir.Model) -> tuple[tuple[str, ...], int]:
    """Names of the `bdq` operators in the graph, in alphabetical order, and their version; `((), 0)` for none."""
    from bdq_runtime.opset import DOMAIN

    names = sorted({node.op_type for node in graph.graph if node.domain == DOMAIN})
    return tuple(names), graph.opset_imports[DOMAIN] if names else 0


def executed_precision(graph: ir.Model) -> str:
    """What linears and attention really compute with, for example "w4a4 in 120 linears, kv4 in 30 layers".

    Weights and activations of 32 bits are float32; "static" scales are fixed at export.
    """
    from bdq_passes import annotations

    linears = Counter(_linear(node) for node in annotations.with_role(graph, annotations.LINEAR))
    caches = Counter(name for node in graph.graph if (name := _cache(node)))
    found = [f"{name} in {count} linears" for name, count in sorted(linears.items())]
    found += [f"{name} in {count} layers" for name, count in sorted(caches.items())]
    return ", ".join(found)


def _linear(node: ir.Node) -> str:
    from bdq_passes import annotations

    spec, dynamic = annotations.spec(node), annotations.activation_bits(node)
    if spec is None:
        return "float32" if dynamic is None else f"w32a{dynamic}"
    static = annotations.has_static_activations(node)
    int8 = static or annotations.executed(node) == "int8"
    return f"w{spec.bits}a{dynamic or (8 if int8 else 32)}" + (" static" if static else "")


def _cache(node: ir.Node) -> str | None:
    """Bits of the cache of an attention node; None for another node, or a float cache."""
    from bdq_passes.bdq_nodes import ATTENTION_OPS

    width = node.attributes.get("kv_cache_bit_width")
    if width is not None and width.as_int():  # of GroupQueryAttention
        return f"kv{width.as_int()} static"
    if node.op_type not in ATTENTION_OPS:
        return None
    key, value = (node.attributes[name].as_int() for name in ("key_bits", "value_bits"))
    return f"kv{key}" if key == value else f"k{key}v{value}"
