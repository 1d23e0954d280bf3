"""Which weight gets how many bits, in blocks of which size."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions, parse_keep
from bdq_export.scheme import FLOAT_BITS, QuantScheme
from bdq_models import Architecture, Dimensions
from bdq_runtime.packing import PerBlock, PerChannel, QuantSpec

SpecOf = Callable[[str], QuantSpec | None]
"""Canonical module path -> how its weight is quantized; None leaves it float."""

END_BITS = 8
"""Bits of the embedding and lm_head by default: both reach every logit, and a lookup costs no compute."""
_END_BLOCKS = (64, 32, 16)


def check_keep(options: ExportOptions, architecture: Architecture, dimensions: Dimensions) -> None:
    """Refuse a `keep` pattern that names no module: a slip of the pen would change nothing, and say nothing.

    Raises:
        UsageError: such a pattern.
    """
    modules = [architecture.embedding, architecture.lm_head]
    for layer in range(dimensions.layers):
        modules += [architecture.layer_path(layer, path) for path in architecture.linears]
    for pattern in options.keep:
        glob, _ = parse_keep(pattern)
        if not fnmatch.filter(modules, glob):
            raise UsageError(
                f"--keep {pattern!r} names no module of this model; those there are: {', '.join(modules[:2])} and in "
                f"layers 0 to {dimensions.layers - 1} as {', '.join(modules[2 : 2 + len(architecture.linears)])}"
            )


def linear_specs(options: ExportOptions) -> SpecOf:
    """The specs of the linears of the decoder blocks."""
    scheme = QuantScheme.parse(options.scheme)

    def spec_of(path: str) -> QuantSpec | None:
        kept = options.bits_of(path)
        bits = scheme.weight_bits if kept is None else kept
        if bits == FLOAT_BITS:
            return None
        per_channel = options.block_size is None or options.is_static
        # Integer operators take no zero points of weights, and at 8 bits they gain nothing.
        symmetric = options.symmetric or bits >= END_BITS or options.is_static
        granularity = PerChannel() if per_channel else PerBlock(options.block_size or 0)
        return QuantSpec(bits, granularity, symmetric)

    return spec_of


def end_specs(
    options: ExportOptions, architecture: Architecture, dimensions: Dimensions, tied: bool
) -> dict[str, QuantSpec]:
    """Canonical weight name -> spec, of the embedding and of lm_head (one entry for both when they are tied).

    The block size is a power of two that divides the hidden size, because a lookup and a product read it.

    Raises:
        UsageError: `keep` asks for different bits of an embedding and an lm_head that share one weight.
    """
    scheme = QuantScheme.parse(options.scheme)
    default = END_BITS if scheme.weight_bits != FLOAT_BITS else FLOAT_BITS
    asked = {module: options.bits_of(module) for module in (architecture.embedding, architecture.lm_head)}
    if tied:
        given = sorted({bits for bits in asked.values() if bits is not None})
        if len(given) > 1:
            raise UsageError(
                f"--keep asks for {given} bits of {architecture.embedding} and {architecture.lm_head}, which share one "
                "weight in this model; ask for the same bits"
            )
        asked = {architecture.embedding: given[0] if given else None}
    specs = {}
    for module, kept in asked.items():
        bits = default if kept is None else kept
        if bits != FLOAT_BITS:
            granularity = PerBlock(_end_block(bits, options, dimensions.hidden_size))
            symmetric = options.symmetric or bits >= END_BITS
            specs[f"{module}.weight"] = QuantSpec(bits, granularity, symmetric)
    return specs


def _end_block(bits: int, options: ExportOptions, columns: int) -> int:
    blocks = _END_BLOCKS if bits >= END_BITS else (options.block_size or 32, *_END_BLOCKS[1:])
    return next((block for block in blocks if columns % block == 0), _END_BLOCKS[-1])
