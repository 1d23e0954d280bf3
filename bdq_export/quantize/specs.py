"""Which weight gets how many bits, in blocks of which size."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import replace

from bdq_export.errors import MissingDependencyError, UsageError
from bdq_export.options import BDQ, SPIN, WHOLE_ROW, ExportOptions, parse_keep
from bdq_export.scheme import FLOAT_BITS, QuantScheme
from bdq_models import Architecture, Dimensions
from bdq_runtime.packing import Granularity, PerBlock, PerChannel, QuantSpec

SpecOf = Callable[[str], QuantSpec | None]
"""Canonical module path -> how its weight is quantized; None leaves it float."""

END_BITS = 8
"""Bits of the embedding and lm_head by default: both reach every logit, and a lookup costs no compute."""
_END_BLOCKS = (64, 32, 16)
_STATIC_CACHE = (1, 27)
"""The first ONNX Runtime whose GroupQueryAttention quantizes its cache on the CPU; 1.26 fails when it runs one."""


def check_cache(options: ExportOptions, dimensions: Dimensions) -> None:
    """Refuse a quantized cache of heads whose codes fill no whole bytes, or that this ONNX Runtime does not have.

    Raises:
        UsageError: such a model.
        MissingDependencyError: a static cache, and an ONNX Runtime that is too old to verify it.
    """
    scheme = QuantScheme.parse(options.scheme)
    if scheme.kv_bits != FLOAT_BITS and dimensions.head_dim % 8:
        raise UsageError(
            f"scheme {scheme} with a head size {dimensions.head_dim}: a quantized KV cache needs a multiple of 8; "
            "leave out kv"
        )
    if options.has_static_cache:
        import onnxruntime

        found = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
        if found < _STATIC_CACHE:
            raise MissingDependencyError(
                f"--kv-scales static needs onnxruntime 1.27, but {onnxruntime.__version__} is installed; run: pip "
                "install -U onnxruntime"
            )


def with_sequence_length(options: ExportOptions, dimensions: Dimensions) -> ExportOptions:
    """The options with calibration sequences that the model's context has room for.

    Raises:
        UsageError: `calib_seq_len` was asked for and is longer.
    """
    limit = dimensions.context_length
    if options.seq_len <= limit or not options.cuts_sequences:
        return options
    if options.calib_seq_len is not None:
        raise UsageError(f"--calib-seq-len is {options.calib_seq_len}, the model's context is {limit}; ask for less")
    return replace(options, calib_seq_len=limit)


def check_rotation(options: ExportOptions, architecture: Architecture) -> None:
    """Refuse to learn a rotation of the residual stream where the family cannot have one.

    Raises:
        UsageError: such a family.
    """
    if options.transform == SPIN and not architecture.residual_rotation:
        raise UsageError(
            f"transform spin learns a residual rotation, but {architecture.name}: its norms do not commute with a "
            "residual rotation; use --transform hadamard or bdq"
        )


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


def linear_specs(options: ExportOptions, chosen: Mapping[str, int] | None = None) -> SpecOf:
    """The specs of the linears of the decoder blocks.

    Args:
        options: of the export.
        chosen: bits by canonical path, in place of the scheme's; `keep` wins over both.
    """
    scheme = QuantScheme.parse(options.scheme)
    own = chosen or {}

    def spec_of(path: str) -> QuantSpec | None:
        kept = options.bits_of(path)
        bits = own.get(path, scheme.weight_bits) if kept is None else kept
        if bits == FLOAT_BITS:
            return None
        # Integer operators take no zero points of weights, at 8 bits they gain nothing, and 3 bits are bdq's only.
        symmetric = options.symmetric or bits >= END_BITS or bits == 3 or options.is_static
        return QuantSpec(bits, _granularity(options.scale_block), symmetric)

    return spec_of


def end_specs(
    options: ExportOptions, architecture: Architecture, dimensions: Dimensions, tied: bool
) -> dict[str, QuantSpec]:
    """Canonical weight name -> spec, of the embedding and of lm_head (one entry for both when they are tied).

    A lookup reads blocks of a power of two that divides the hidden size; what a bdq lm_head of per-token activations
    reads has one scale a row.

    Raises:
        UsageError: `keep` asks for different bits of an embedding and an lm_head that share one weight, or for 3 bits
            of an embedding, which no lookup reads.
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
    if asked[architecture.embedding] == 3:
        raise UsageError(f"--keep asks for 3 bits of {architecture.embedding}; an embedding has 2, 4, 8 or 16")
    specs = {}
    for module, kept in asked.items():
        bits = default if kept is None else kept
        if bits != FLOAT_BITS:
            is_head = tied or module == architecture.lm_head
            block = _end_block(bits, options, dimensions.hidden_size, is_head)
            symmetric = options.symmetric or bits >= END_BITS or bits == 3
            specs[f"{module}.weight"] = QuantSpec(bits, _granularity(block), symmetric)
    return specs


def _granularity(block: int) -> Granularity:
    return PerChannel() if block == WHOLE_ROW else PerBlock(block)


def _end_block(bits: int, options: ExportOptions, columns: int, is_head: bool) -> int:
    if is_head and options.is_per_token:
        return WHOLE_ROW
    if is_head and (options.linear_ops == BDQ or bits == 3):
        return 64 if bits >= END_BITS else options.scale_block or 32
    blocks = _END_BLOCKS if bits >= END_BITS else (options.scale_block or 32, *_END_BLOCKS[1:])
    return next((block for block in blocks if columns % block == 0), _END_BLOCKS[-1])
