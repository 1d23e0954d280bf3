"""Which images there are: each kernel with its constants, and the types of its arguments. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from bdq_runtime.gpu.kernels.names import image_name

TARGETS = (80, 89, 90, 100, 120)
"""Compute capabilities with machine code; the PTX of the first serves every newer GPU through the driver's compiler."""

_ROW = "i32 K, i32:16 padded"
_HADAMARD = "i32 log_n, fp32 grid, fp32 root"
_CODES = "*i8 q, *fp32 scale, *i32 total, *i32 sums"
_GRID = "fp32 c, fp32 high, i32 log_fields, i32 has_sums"
_LINEAR = "i32 multiple, i32 zero, i32 blocks, i32 log_block, i32 gate, i32 has_bias"
_OUT = "*fp16 scales, *fp32 bias, *fp32 y"
_HEADS = "i32 heads, i32 kv_heads, i32 D"
_QUERY = "*fp16 high, *fp16 low, *fp32 factors"

ARGUMENTS: Mapping[str, str] = MappingProxyType(
    {
        "rows.hadamard_rows": f"*fp32 x, *fp32 diagonal, *fp32 y, i32 K, i32 interleave, {_HADAMARD}, i32 has_diagonal",
        "rows.quantize_rows": f"*fp32 x, {_CODES}, {_ROW}, {_GRID}",
        "rows.rotate_quantize_rows": f"*fp32 x, *fp32 diagonal, *fp32 y, {_CODES}, {_ROW}, i32 interleave, {_HADAMARD},"
        f" {_GRID}",
        "rows.fake_quantize_rows": "*fp32 x, *fp32 y, i32 K, fp32 c, fp32 high",
        "gemm.low_bit_gemm": f"{_CODES}, *u8 weight, {_OUT}, i32 M, i32 N, i32:16 rows, i32:16 padded, {_LINEAR}",
        "gemv.low_bit_gemv": f"*i32 q, *fp32 scale, *i32 total, *i32 weight, {_OUT}, i32 N, i32:16 rows, i32:16 padded,"
        f" {_LINEAR}",
        "float_gemm.float_gemm": f"*fp32 x, *u8 weight, {_OUT}, i32 M, i32 N, i32:16 rows, {_ROW}, i32 bits, {_LINEAR}",
        "cache.attention_rows": f"*fp32 query, *fp32 key, *fp32 value, *i32 seqlens, *fp32 cos, *fp32 sin, {_QUERY},"
        " *u8 present_key, *u8 present_value, i32 query_stride, i32 key_stride, i32 value_stride, i32 S, i32 total,"
        f" i32 positions, {_HEADS}, i32 half, {_HADAMARD}, i32 key_bits, i32 value_bits, fp32 key_clip,"
        " fp32 value_clip, fp32 scale",
        "cache.move_cache": "*u8 past, *u8 present, i64 past_size, i64 present_size",
        "attention.cached_attention": f"{_QUERY}, *u8 key, *u8 value, *i32 seqlens, *fp32 output, *fp32 parts,"
        f" *fp32 weights, i32 S, i32 total, i32 positions, {_HEADS}, i32 key_bits, i32 value_bits, fp32 softcap,"
        " i32 window, i32 count",
        "attention.combine_parts": "*fp32 parts, *fp32 weights, *fp32 output, i32 D, i32 count",
    }
)
"""Kernel -> its arguments, `type[:alignment] name`; pointers are aligned to 16 bytes."""


@dataclass(frozen=True)
class Image:
    """One compiled kernel, for every target.

    Attributes:
        kernel: module and function below `bdq_runtime.gpu.kernels`.
        constants: the function's `constexpr` arguments.
        warps: of 32 threads, in a program.
        stages: of the software pipeline.
    """

    kernel: str
    constants: Mapping[str, int] = field(hash=False)
    warps: int = 4
    stages: int = 3

    @property
    def name(self) -> str:
        """The entry point, one for each image."""
        return image_name(self.kernel.partition(".")[2], self.constants)

    @property
    def arguments(self) -> list[tuple[str, int]]:
        """Type and alignment of each argument, in order."""
        found = []
        for part in ARGUMENTS[self.kernel].split(","):
            kind, _, alignment = part.split()[0].partition(":")
            if kind == "*u8" and self.constants.get("WORDS"):
                kind = "*i32"
            found.append((kind, int(alignment or (16 if kind.startswith("*") else 1))))
        return found


def _images() -> list[Image]:
    found = [Image("rows.quantize_rows", {"BLOCK": 1024}), Image("rows.fake_quantize_rows", {"BLOCK": 1024})]
    for block, warps in ((1024, 4), (4096, 8)):
        found.append(Image("rows.hadamard_rows", {"BLOCK": block}, warps))
        found.append(Image("rows.rotate_quantize_rows", {"BLOCK": block}, warps))
    for bits in (2, 3, 4, 8):
        found.append(Image("gemv.low_bit_gemv", {"BITS": bits, "KG": 32, "ASM": 1}))
        found.append(Image("gemm.low_bit_gemm", {"BITS": bits, "BN": 64, "BM": 16, "BLOCKED": 0, "ASM": 1}, 4, 4))
        found.append(Image("gemm.low_bit_gemm", {"BITS": bits, "BN": 128, "BM": 128, "BLOCKED": 0, "ASM": 1}, 8, 3))
        found.append(Image("gemm.low_bit_gemm", {"BITS": bits, "BN": 64, "BM": 32, "BLOCKED": 1, "ASM": 1}, 4, 4))
    found.append(Image("float_gemm.float_gemm", {"BN": 64, "BM": 32}, 4, 3))
    found.append(Image("cache.move_cache", {"BLOCK": 2048, "WORDS": 0}))
    found.append(Image("cache.move_cache", {"BLOCK": 1024, "WORDS": 1}))
    for width, warps, keys in ((64, 4, 64), (128, 4, 32), (256, 8, 32)):
        found.append(Image("cache.attention_rows", {"BD": width}, width // 64))
        found.append(Image("attention.cached_attention", {"BD": width, "BM": 16, "BN": keys, "ASM": 1}, warps, 2))
    for width in (64, 128):
        found.append(Image("attention.cached_attention", {"BD": width, "BM": 64, "BN": 32, "ASM": 1}, 8, 2))
    found.append(Image("attention.combine_parts", {"PARTS": 32}, 2))
    return found


IMAGES: Mapping[str, Image] = MappingProxyType({image.name: image for image in _images()})
"""Every image by its name."""
