"""All inputs of an export, validated once; the same words as the command's flags and `bdq_config.json`'s keys."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from bdq_export.errors import UsageError
from bdq_export.scheme import FLOAT_BITS, QuantScheme

TRANSFORMS = ("auto", "none", "smooth", "hadamard", "bdq")
WEIGHTS = ("gptq", "rtn")
OPS = ("matmulnbits", "qdq", "qlinear")
STATIC_OPS = ("qdq", "qlinear")
BLOCK_SIZES = (16, 32, 64, 128, 256)
KEEP_BITS = (2, 4, 8, 16)
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked to do; paths of the model and of the output are given beside it.

    Attributes:
        scheme: bits, for example "w4a16" (see `QuantScheme`).
        transform: which transforms are tried; "auto" measures them and keeps the best.
        weights: "gptq" or "rtn" (round to nearest).
        block_size: columns that share a weight scale; None is one scale for each output channel.
        symmetric: no stored zero points; weights of 8 bits never have any.
        calib: "self" (text sampled from the model) or a path of a UTF-8 text file.
        calib_samples: number of calibration sequences.
        calib_seq_len: tokens in each.
        seed: of every random choice.
        keep: `MODULE=BITS` patterns (glob on module paths); 16 leaves a module float.
        ops: "matmulnbits", or static "qdq" / "qlinear" for w8a8.
        accuracy_level: of MatMulNBits; 4 computes with int8 activations inside the kernel, 0 in float32.
        full_logits: logits of all positions instead of the last.
        min_top1: smallest top-1 agreement with the float model that passes; None is a default for the scheme.

    Raises:
        UsageError: a value outside its choices, or a combination that cannot be meant.
    """

    scheme: str = "w4a16"
    transform: str = "auto"
    weights: str = "gptq"
    block_size: int | None = 32
    symmetric: bool = True
    calib: str = "self"
    calib_samples: int = 24
    calib_seq_len: int = 512
    seed: int = 0
    keep: tuple[str, ...] = ()
    ops: str = "matmulnbits"
    accuracy_level: int = 4
    full_logits: bool = False
    min_top1: float | None = None

    def __post_init__(self) -> None:
        scheme = QuantScheme.parse(self.scheme)
        _choice("transform", self.transform, TRANSFORMS)
        _choice("weights", self.weights, WEIGHTS)
        _choice("ops", self.ops, OPS)
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise UsageError(f"block size is {self.block_size}, expected one of {BLOCK_SIZES} or channel")
        _at_least("calib-samples", self.calib_samples, 2)
        _at_least("calib-seq-len", self.calib_seq_len, 32)
        _at_least("seed", self.seed, 0)
        if self.seed > MAX_SEED:
            raise UsageError(f"seed is {self.seed}, expected at most {MAX_SEED}")
        if not 0 <= self.accuracy_level <= 4:
            raise UsageError(f"accuracy level is {self.accuracy_level}, expected 0 to 4")
        if self.min_top1 is not None and not 0 <= self.min_top1 <= 1:
            raise UsageError(f"min-top1 is {self.min_top1}, expected a fraction from 0 to 1")
        for pattern in self.keep:
            parse_keep(pattern)
        _check_scheme(scheme, self)

    @property
    def is_static(self) -> bool:
        """Whether activations have scales that are fixed at export: integer operators of standard ONNX."""
        return self.ops in STATIC_OPS

    def bits_of(self, module: str) -> int | None:
        """Bits that `keep` asks for `module`, or None; the last matching pattern wins."""
        bits = None
        for pattern in self.keep:
            glob, value = parse_keep(pattern)
            if fnmatch.fnmatchcase(module, glob):
                bits = value
        return bits


def parse_keep(text: str) -> tuple[str, int]:
    """`MODULE=BITS` as a glob on module paths and a bit width.

    Raises:
        UsageError: no "=", an empty pattern, or bits that no operator has.
    """
    module, separator, bits = text.rpartition("=")
    if not separator or not module or not bits.isdigit() or int(bits) not in KEEP_BITS:
        raise UsageError(
            f"--keep {text!r} is not MODULE=BITS with BITS one of {KEEP_BITS}; "
            "write for example --keep 'model.layers.0.*=8'"
        )
    return module, int(bits)


def parse_block_size(text: str) -> int | None:
    """A block size as the flag spells it: a number, or "channel" for None.

    Raises:
        UsageError: neither.
    """
    if text == "channel":
        return None
    if not text.isdigit() or int(text) not in BLOCK_SIZES:
        raise UsageError(f"block size {text!r} is not one of {BLOCK_SIZES} or channel")
    return int(text)


def parse_calib(text: str) -> str | Path:
    """ "self", or the path of a calibration text."""
    return text if text == "self" else Path(text)


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{name} is {value}, expected at least {least}")


def _check_scheme(scheme: QuantScheme, options: ExportOptions) -> None:
    if scheme.kv_bits != FLOAT_BITS or scheme.activation_bits < 8 or scheme.weight_bits == 3:
        raise UsageError(
            f"scheme {scheme}: this version writes stock ONNX Runtime operators only, which have no "
            "3-bit weights, no activations below 8 bits and no dynamic low-bit KV cache; "
            "use w2a16, w4a16, w8a16, w4a8 or w8a8"
        )
    if scheme.weight_bits == FLOAT_BITS and scheme.activation_bits != FLOAT_BITS:
        raise UsageError(f"scheme {scheme}: float weights with quantized activations have no operator; use w8a8")
    if options.ops != "matmulnbits" and (scheme.weight_bits, scheme.activation_bits) != (8, 8):
        raise UsageError(f"--ops {options.ops} is static w8a8, but the scheme is {scheme}; add --scheme w8a8")
    if options.ops == "matmulnbits" and scheme.activation_bits == 8 and options.accuracy_level != 4:
        raise UsageError(f"scheme {scheme} computes with int8 activations: --accuracy-level must be 4")
    if scheme.weight_bits == 8 and options.ops == "matmulnbits" and options.accuracy_level != 4:
        raise UsageError(
            f"scheme {scheme} with accuracy level {options.accuracy_level}: 8-bit MatMulNBits is slow below 4; "
            "use --accuracy-level 4"
        )
