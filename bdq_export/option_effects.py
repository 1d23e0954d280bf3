"""Options that were given and would do nothing: refused, so that nobody believes in them.

Only where a value is not the default: nothing else tells what was given.
"""

from __future__ import annotations

from bdq_export.errors import UsageError
from bdq_export.options import BDQ, MATMULNBITS, WHOLE_ROW, ExportOptions, parse_keep
from bdq_export.scheme import FLOAT_BITS, QuantScheme

_LOW_BITS = (2, 4)
"""Bits of weights that MatMulNBits has zero points of, and float products below accuracy level 4."""


def check_effects(options: ExportOptions) -> None:
    """Refuse what has no effect beside the other options.

    Raises:
        UsageError: names the option, and why it does nothing.
    """
    scheme = QuantScheme.parse(options.scheme)
    kept = {parse_keep(pattern)[1] for pattern in options.keep}
    float_weights = scheme.weight_bits == FLOAT_BITS
    # `keep` may name an embedding or an lm_head, which MatMulNBits computes beside other operators.
    low = kept & set(_LOW_BITS)
    by_matmulnbits = options.linear_ops == MATMULNBITS and not float_weights
    computed = f"{scheme} by {options.linear_ops}"
    if options.block_size not in (None, WHOLE_ROW) and options.is_static:
        raise UsageError(f"--block-size: weights of static --ops {options.ops} have one scale a row; leave it out")
    if options.block_size is not None and float_weights and kept <= {FLOAT_BITS}:
        raise UsageError(f"--block-size: scheme {scheme} leaves weights float; leave it out")
    if not options.symmetric and not by_matmulnbits and not low:
        raise UsageError(f"--asymmetric: {computed} has no weights with zero points; leave it out")
    if options.accuracy_level != 4 and not by_matmulnbits and (options.ops == BDQ or not low):
        raise UsageError(f"--accuracy-level is of MatMulNBits, but there is none in {computed}; leave it out")
    _check_calibration(options)


def _check_calibration(options: ExportOptions) -> None:
    if options.calibrates:
        return
    reason = "--transform none --weights rtn calibrates nothing at"
    if options.calib_samples is not None:
        raise UsageError(f"--calib-samples: {reason} {options.scheme}; leave it out")
    if options.calib_seq_len is not None and not options.cuts_sequences:
        raise UsageError(f"--calib-seq-len: {reason} {options.scheme}; leave it out")
