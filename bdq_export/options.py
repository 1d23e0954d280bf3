"""All inputs of an export, validated once; the same words as the command's flags and `bdq_config.json`'s keys."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

from bdq_export.errors import UsageError
from bdq_export.scheme import FLOAT_BITS, QuantScheme

PARTIAL = ("diag", "diag-before", "diag-none")
"""Transforms that leave out diagonals beside the online rotations of "bdq"."""
SPIN = "spin"
"""The transform whose rotations are learned."""
KRONECKER = "kronecker"
"""FlatQuant's learned transforms, to compare with."""
TRANSFORMS = ("auto", "none", "smooth", "hadamard", SPIN, KRONECKER, "bdq", "bdq-plain", *PARTIAL)
WEIGHTS = ("gptq", "rtn")
AUTO = "auto"
MATMULNBITS = "matmulnbits"
BDQ = "bdq"
STATIC_OPS = ("qdq", "qlinear")
OPS = (AUTO, BDQ, MATMULNBITS, *STATIC_OPS)
DYNAMIC = "dynamic"
STATIC = "static"
KV_SCALES = (DYNAMIC, STATIC)
STATIC_KV_BITS = (4, 8)
"""Of the cache that GroupQueryAttention quantizes itself."""
EFFORTS = ("fast", "standard", "best")
LOSSES = ("kl", "ce", "rce", "rce-printed")
LOSS_TARGETS = ("teacher", "label")
BLOCK_SIZES = (16, 32, 64, 128, 256)
WHOLE_ROW = 0
"""The block size that stands for one scale a row."""
KEEP_BITS = (2, 3, 4, 8, 16)
MAX_SEED = 2**63 - 1
_FEW_BITS = 4
"""Bits of activations or weights from which "standard" learns: activations of so many, or weights of fewer."""
_MANY_BITS = 8
"""Bits of weights whose rounding is not worth a measurement of its own."""
_SAMPLES = {"fast": 24, "standard": 128, "best": 128}
"""Calibration sequences by effort where scales are learned; the fewest of them elsewhere, unless rotations are."""
_SEQ_LEN = 512


@dataclass(frozen=True)
class ExportOptions:
    """What an export is asked to do; paths of the model and of the output are given beside it.

    Attributes:
        scheme: bits, for example "w4a16" (see `QuantScheme`).
        transform: which transforms are tried; "auto" measures them and keeps the best. "bdq-plain" (no rotation) and
            the `PARTIAL` ones are parts of "bdq", to compare with; "spin" is "hadamard" with learned rotations and
            "kronecker" is FlatQuant, whose transforms are learned block by block whatever the effort. "auto" tries none
            of these.
        weights: "gptq" or "rtn" (round to nearest).
        block_size: columns that share a weight scale; 0 is one scale for each output channel, None a default for the
            scheme (see `scale_block`).
        symmetric: no stored zero points; weights of 8 bits never have any.
        activation_clip: part of a token's largest activation where its grid ends, the same at every site; the cache is
            not clipped then. None searches both, site by site.
        calib: "self" (text sampled from the model) or a path of a UTF-8 text file.
        effort: "fast" learns nothing; "standard" learns scales end to end where activations have 4 bits or fewer or
            weights fewer than 4; "best" wherever weights are quantized, in more steps. Where scales are learned and
            inputs quantized token by token, and with "best", GPTQ weighs errors by what they do to the predictions.
        loss: what is learned by: "kl" to the float model, "ce", "rce" or "rce-printed" (`learning.losses`).
        loss_delta: δ of the two reverse losses.
        loss_target: what these compare with, "teacher" or "label".
        calib_samples: number of calibration sequences; None is a default for the effort (see `samples`).
        calib_seq_len: tokens in each; None is a default that fits the model (see `seq_len`).
        seed: of every random choice.
        target_bits: average bits of the codes of the decoder blocks' weights; each site gets as many as its measured
            sensitivity earns (see `quantize.target_bits`). None gives all of them those of the scheme.
        keep: `MODULE=BITS` patterns (glob on module paths); 16 leaves a module float.
        ops: what computes the linears: "matmulnbits" of ONNX Runtime, the project's "bdq" operators, static "qdq" /
            "qlinear" for w8a8, or "auto" (see `linear_ops`). A quantized KV cache takes a bdq operator whatever `ops`,
            unless its scales are static.
        kv_scales: of a quantized KV cache: "dynamic" measures each token and head, in a bdq operator; "static" has one
            for each channel, fixed by calibration, in the cache of 4 or 8 bits that GroupQueryAttention has itself.
        accuracy_level: of MatMulNBits; 4 computes with int8 activations inside the kernel, 0 in float32.
        full_logits: logits of all positions instead of the last.
        min_top1: smallest top-1 agreement with the float model that passes; None is a default for the scheme.

    Raises:
        UsageError: a value outside its choices, or a combination that cannot be meant.
    """

    scheme: str = "w4a16"
    transform: str = "auto"
    weights: str = "gptq"
    block_size: int | None = None
    symmetric: bool = True
    activation_clip: float | None = None
    calib: str = "self"
    effort: str = "standard"
    loss: str = "kl"
    loss_delta: float = 0.5
    loss_target: str = "teacher"
    calib_samples: int | None = None
    calib_seq_len: int | None = None
    seed: int = 0
    target_bits: float | None = None
    keep: tuple[str, ...] = ()
    ops: str = AUTO
    kv_scales: str = DYNAMIC
    accuracy_level: int = 4
    full_logits: bool = False
    min_top1: float | None = None

    def __post_init__(self) -> None:
        QuantScheme.parse(self.scheme)
        _choice("transform", self.transform, TRANSFORMS)
        _choice("weights", self.weights, WEIGHTS)
        _choice("ops", self.ops, OPS)
        _choice("kv-scales", self.kv_scales, KV_SCALES)
        _choice("effort", self.effort, EFFORTS)
        _choice("loss", self.loss, LOSSES)
        _choice("loss-target", self.loss_target, LOSS_TARGETS)
        if not 0 <= self.loss_delta <= 1:
            raise UsageError(f"loss-delta is {self.loss_delta}, expected a number from 0 to 1")
        if self.block_size not in (None, WHOLE_ROW, *BLOCK_SIZES):
            raise UsageError(f"block size is {self.block_size}, expected one of {BLOCK_SIZES} or channel")
        if self.calib_samples is not None:
            _at_least("calib-samples", self.calib_samples, 2)
        if self.calib_seq_len is not None:
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
        # They know these options.
        from bdq_export.option_effects import check_effects
        from bdq_export.option_rules import check_rules, check_transform

        check_rules(self)
        check_effects(self)
        check_transform(self)

    @property
    def linear_ops(self) -> str:
        """What computes the linears, never "auto": stock operators wherever they express the scheme."""
        if self.ops != AUTO:
            return self.ops
        return BDQ if needs_bdq(QuantScheme.parse(self.scheme)) else MATMULNBITS

    @property
    def is_static(self) -> bool:
        """Whether activations have scales that are fixed at export: integer operators of standard ONNX."""
        return self.ops in STATIC_OPS

    @property
    def has_static_cache(self) -> bool:
        """Whether the KV cache has a scale for each channel that is fixed at export, in GroupQueryAttention."""
        return self.kv_scales == STATIC

    @property
    def is_per_token(self) -> bool:
        """Whether activations of linears are quantized with one dynamic scale a token, by bdq operators."""
        return self.linear_ops == BDQ and QuantScheme.parse(self.scheme).activation_bits != FLOAT_BITS

    @property
    def learns(self) -> bool:
        """Whether scales are learned end to end; never those of static activations, whose ranges are measured."""
        scheme = QuantScheme.parse(self.scheme)
        if self.effort == "fast" or self.is_static or scheme.weight_bits == FLOAT_BITS:
            return False
        if self.transform == "none" and self.weights == "rtn":  # plain rounding was asked for
            return False
        return self.effort == "best" or self.rounds_coarsely

    @property
    def rounds_coarsely(self) -> bool:
        """Whether activations have so few bits, or weights fewer, that rounding costs much."""
        scheme = QuantScheme.parse(self.scheme)
        weight_bits = min(self.target_bits or scheme.weight_bits, scheme.weight_bits)
        return weight_bits < _FEW_BITS or (self.is_per_token and scheme.activation_bits <= _FEW_BITS)

    @property
    def weighs_outputs(self) -> bool:
        """Whether GPTQ weighs errors of outputs by what they do to the predictions (`output_curvature`)."""
        bits = min(self.target_bits or FLOAT_BITS, QuantScheme.parse(self.scheme).weight_bits)
        asked = self.is_per_token or self.effort == "best"  # it takes minutes
        return self.weights == "gptq" and self.learns and asked and bits < _MANY_BITS

    @property
    def calibrates(self) -> bool:
        """Whether anything is decided on calibration text; weights that are just rounded are verified on some."""
        rounds = self.weights == "rtn" and self.transform == "none" and self.target_bits is None
        quantizes_inputs = self.is_per_token or QuantScheme.parse(self.scheme).kv_bits != FLOAT_BITS
        return not rounds or self.is_static or quantizes_inputs

    @property
    def cuts_sequences(self) -> bool:
        """Whether `seq_len` decides anything: a file is cut into sequences in any case, for verification."""
        return self.calibrates or self.calib != "self"

    @property
    def samples(self) -> int:
        """Calibration sequences: what was asked for, else what suits the effort."""
        if self.transform in (SPIN, KRONECKER) and not self.learns:
            return self.calib_samples or _SAMPLES["standard"]  # these learn at every effort
        return self.calib_samples or _SAMPLES[self.effort if self.learns else "fast"]

    @property
    def seq_len(self) -> int:
        """Tokens of a calibration sequence: what was asked for, else what fits a context of that many."""
        return self.calib_seq_len or _SEQ_LEN

    @property
    def scale_block(self) -> int:
        """Columns that share a weight scale, 0 for a whole row: what was asked for, else what suits the operators.

        Integer sums over a whole row are exact and need one multiplication, so per-token activations take whole rows.
        """
        if self.is_static:
            return WHOLE_ROW
        if self.block_size is not None:
            return self.block_size
        return WHOLE_ROW if self.is_per_token else 32

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


def parse_block_size(text: str | None) -> int | None:
    """A block size as the flag spells it: a number, "channel" for 0, or None where it is not given.

    Raises:
        UsageError: neither.
    """
    if text is None:
        return None
    if text == "channel":
        return WHOLE_ROW
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


def needs_bdq(scheme: QuantScheme) -> bool:
    """Whether no stock operator computes linears of `scheme`: 3 bits, or activations that a kernel must quantize."""
    float_weights = scheme.weight_bits == FLOAT_BITS
    return (
        scheme.weight_bits == 3
        or scheme.activation_bits < 8
        or (float_weights and scheme.activation_bits != FLOAT_BITS)
    )
