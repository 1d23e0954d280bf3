"""Options that do not go together, or that a scheme does not have: refused before any work."""

from __future__ import annotations

from bdq_export.errors import UsageError
from bdq_export.options import (
    AUTO,
    BDQ,
    KRONECKER,
    MATMULNBITS,
    PARTIAL,
    SPIN,
    STATIC_KV_BITS,
    ExportOptions,
    needs_bdq,
    parse_keep,
)
from bdq_export.scheme import FLOAT_BITS, QuantScheme


def check_rules(options: ExportOptions) -> None:
    """Refuse what cannot be exported as it was asked for.

    Raises:
        UsageError: names the option, what it does not go with, and what does.
    """
    scheme = QuantScheme.parse(options.scheme)
    if options.target_bits is not None:
        _check_target(scheme, options)
    _check_scheme(scheme, options)
    if options.has_static_cache:
        _check_static_cache(scheme)
    if options.transform == KRONECKER:
        _check_kronecker(scheme, options)
    if options.activation_clip is not None:
        _check_clip(scheme, options)
    _check_learning(options)


def check_transform(options: ExportOptions) -> None:
    """Refuse a transform beside activations that are not rounded for each token.

    Raises:
        UsageError: as said.
    """
    if options.is_per_token:
        return
    if options.transform in PARTIAL:
        raise UsageError(
            f"transform {options.transform} leaves out diagonals beside online rotations, but {options.scheme} by "
            f"{options.linear_ops} has no such rotations; use bdq-plain, or a scheme such as w4a4kv4"
        )
    if options.transform == SPIN:
        raise UsageError(
            f"transform spin learns rotations by how activations are rounded for each token, but {options.scheme} by "
            f"{options.linear_ops} rounds none so; use hadamard, or a scheme such as w4a4kv4"
        )


def _check_scheme(scheme: QuantScheme, options: ExportOptions) -> None:
    if options.is_static and str(scheme) != "w8a8":
        raise UsageError(f"--ops {options.ops} is static w8a8, but the scheme is {scheme}; add --scheme w8a8")
    if options.ops == MATMULNBITS and needs_bdq(scheme):
        raise UsageError(
            f"scheme {scheme}: MatMulNBits has weights of 2, 4 and 8 bits, and activations of 8 or 16; "
            "use --ops auto, or w2a16, w4a16, w8a16, w2a8, w4a8 or w8a8"
        )
    if options.linear_ops == BDQ or _keeps_3_bits(options):
        _check_bdq(scheme, options)
    if options.linear_ops == MATMULNBITS:
        _check_accuracy_level(scheme, options)


def _check_static_cache(scheme: QuantScheme) -> None:
    if scheme.kv_bits == FLOAT_BITS:
        raise UsageError(
            f"--kv-scales static is of a quantized KV cache, but scheme {scheme} leaves it float; write for example "
            f"{scheme}kv8"
        )
    if scheme.kv_bits not in STATIC_KV_BITS:
        raise UsageError(
            f"scheme {scheme}: the cache of GroupQueryAttention has 4 or 8 bits; use kv4 or kv8, or --kv-scales dynamic"
        )


def _check_target(scheme: QuantScheme, options: ExportOptions) -> None:
    if options.target_bits is None or not 2 <= options.target_bits <= 8:
        raise UsageError(f"target-bits is {options.target_bits}, expected an average from 2 to 8, for example 4.25")
    if scheme.weight_bits == FLOAT_BITS:
        raise UsageError(f"--target-bits chooses bits of quantized weights, but scheme {scheme} leaves them float")
    if options.is_static:
        raise UsageError(f"--target-bits: static --ops {options.ops} has weights of 8 bits only; use --ops auto or bdq")


def _check_kronecker(scheme: QuantScheme, options: ExportOptions) -> None:
    if not options.is_per_token:
        raise UsageError(
            f"transform {KRONECKER} multiplies activations that have a scale for each token, but {scheme} by "
            f"{options.linear_ops} has none; use bdq, or a scheme such as w4a4kv4"
        )
    if options.weights != "gptq":
        raise UsageError(
            f"transform {KRONECKER} is learned block by block before GPTQ rounds, but --weights is {options.weights}; "
            "leave it out"
        )
    if options.activation_clip is not None:
        raise UsageError(f"--activation-clip fixes what transform {KRONECKER} learns; leave one of them out")


def _check_clip(scheme: QuantScheme, options: ExportOptions) -> None:
    if not 0 < (options.activation_clip or 0) <= 1:
        raise UsageError(f"activation-clip is {options.activation_clip}, expected above 0 and at most 1")
    if not options.is_per_token:
        raise UsageError(
            f"--activation-clip: {scheme} by {options.linear_ops} has no activations with a scale for each token; "
            "leave it out, or use a scheme such as w4a4kv4"
        )
    if options.learns:
        raise UsageError(f"--activation-clip fixes what --effort {options.effort} learns; add --effort fast")


def _keeps_3_bits(options: ExportOptions) -> bool:
    return any(parse_keep(pattern)[1] == 3 for pattern in options.keep)


def _check_bdq(scheme: QuantScheme, options: ExportOptions) -> None:
    if options.linear_ops != BDQ and options.ops != AUTO:
        raise UsageError(f"--keep with 3 bits needs a bdq operator, but --ops is {options.ops}; use --ops auto or bdq")
    if options.block_size == 16:
        raise UsageError(f"scheme {scheme}: the bdq operators have no block size 16; use 32, 64, 128, 256 or channel")
    if not options.symmetric and options.linear_ops == BDQ:
        raise UsageError(
            f"scheme {scheme}: the bdq operators have symmetric weights only; leave out --asymmetric"
            + (", or use --ops matmulnbits" if not needs_bdq(scheme) else "")
        )


def _check_learning(options: ExportOptions) -> None:
    """Options of the learned stages are refused where they would do nothing."""
    if options.effort == "best" and not options.learns:
        raise UsageError(
            f"effort best has nothing to learn: {options.scheme} with --ops {options.ops}, --transform "
            f"{options.transform} and --weights {options.weights} has no scales to learn end to end; leave --effort out"
        )
    if options.loss != "kl" and not options.learns:
        raise UsageError(
            f"loss {options.loss} is for learning, but nothing is learned at {options.scheme} with --effort "
            f"{options.effort}; add --effort best, or leave --loss out"
        )
    reverse = options.loss.startswith("rce")
    if not reverse and (options.loss_delta, options.loss_target) != (0.5, "teacher"):
        raise UsageError(f"loss-delta and loss-target are of the reverse losses, but loss is {options.loss}; use rce")


def _check_accuracy_level(scheme: QuantScheme, options: ExportOptions) -> None:
    if scheme.activation_bits == 8 and options.accuracy_level != 4:
        raise UsageError(f"scheme {scheme} computes with int8 activations: --accuracy-level must be 4")
    if scheme.weight_bits == 8 and options.accuracy_level != 4:
        raise UsageError(
            f"scheme {scheme} with accuracy level {options.accuracy_level}: 8-bit MatMulNBits is slow below 4; "
            "use --accuracy-level 4"
        )
