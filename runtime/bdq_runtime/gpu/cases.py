"""Calls of every operator with random data, and what they must give: for the test of a GPU and of the emulated one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.gpu.one_node import one_node_model
from bdq_runtime.opset import OPERATORS
from bdq_runtime.panels import interleave_panels, pack_panels, pack_scales
from bdq_runtime.reference import dynamic_fake_quantize, hadamard, kv_attention, low_bit_linear
from bdq_runtime.reference.attention import split_qkv
from bdq_runtime.reference.cache_rows import quantize_cache_rows

Array = npt.NDArray[Any]
_CONSTANTS = frozenset({"weight", "scales", "bias", "diagonal", "cos_cache", "sin_cache"})


@dataclass(frozen=True, eq=False)
class Case:
    """One call.

    Attributes:
        operator: its name.
        exact: the first output has the reference's bits; otherwise it agrees to rounding. Caches are always exact.
        inputs: an array for each input.
        attributes: of the node.
    """

    operator: str
    exact: bool
    inputs: Mapping[str, Array]
    attributes: Mapping[str, Any]

    def feeds(self) -> dict[str, Array]:
        """Inputs that `model()` leaves open."""
        return {name: array for name, array in self.inputs.items() if name not in _CONSTANTS}

    def model(self) -> bytes:
        """An ONNX model of the node."""
        return one_node_model(self.operator, self.inputs, self.attributes, frozenset(self.feeds()))

    def expected(self) -> tuple[Array, ...]:
        """The outputs by NumPy."""
        given = {**OPERATORS[self.operator].attributes, **self.attributes}
        if "weight" in self.inputs:
            return (_expected_linear(self.inputs, given),)
        if "past_key" in self.inputs:
            return _expected_attention(self.inputs, given)
        x = self.inputs["x"]
        if "size" in given:
            return (hadamard(x, given["size"], given["interleave"]),)
        return (dynamic_fake_quantize(x, given["bits"], given["clip"]),)


def linear(operator: str, m: int, k: int, n: int, exact: bool = False, **attributes: Any) -> Case:
    """A linear operator on m rows."""
    random = np.random.default_rng([m, k, n])
    table = OPERATORS[operator]
    given = {"K": k, "N": n, "weight_bits": 4, "activation_bits": 4, **attributes}
    bits, block, halves = given["weight_bits"], given.get("block_size") or k, 2 if "gate" in table.attributes else 1
    if "hadamard_size" in table.attributes:
        given.setdefault("hadamard_size", 32)
    weights = [pack_panels(random.integers(0, 1 << bits, (n, k), dtype=np.uint8), bits) for _ in range(halves)]
    scales = [pack_scales(random.uniform(0.5, 1.5, (n, -(-k // block))) * 2.0**-bits / k**0.5) for _ in range(halves)]
    inputs = {
        "x": random.standard_normal((1, m, k)).astype(np.float32),
        "diagonal": random.uniform(0.5, 2, k).astype(np.float32),
        "weight": interleave_panels(*weights) if halves == 2 else weights[0],
        "scales": interleave_panels(*scales) if halves == 2 else scales[0],
        "bias": random.standard_normal(halves * n).astype(np.float32),
    }
    return Case(operator, exact, {name: inputs[name] for name in table.inputs}, given)


def attention(
    operator: str, past: tuple[int, ...], tokens: int, room: int, heads: tuple[int, int, int], **attributes: Any
) -> Case:
    """An attention operator: tokens behind each row's, spare positions of the cache, (heads, KV heads, head size)."""
    random = np.random.default_rng([tokens, room, *heads])
    (q, kv, size), batch, total = heads, len(past), max(past) + tokens
    given = {"num_heads": q, "kv_num_heads": kv, "head_size": size, "key_bits": 4, "value_bits": 4, "scale": 0.3}
    given |= attributes
    angles = random.uniform(0, 6.3, (total, 4))
    inputs: dict[str, Array] = {
        part: random.standard_normal((batch, tokens, count * size)).astype(np.float32)
        for part, count in (("query", q), ("key", kv), ("value", kv), ("qkv", q + 2 * kv))
    }
    for part in ("key", "value"):
        rows = random.standard_normal((batch, kv, max(past) + room + 1, size)).astype(np.float32)
        inputs[f"past_{part}"] = quantize_cache_rows(rows, int(given[f"{part}_bits"]))[:, :, 1:].copy()
    inputs["seqlens_k"] = np.array(past, np.int32) + np.int32(tokens - 1)
    inputs["total_sequence_length"] = np.array(total, np.int32)
    inputs["cos_cache"], inputs["sin_cache"] = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return Case(operator, False, {name: inputs[name] for name in OPERATORS[operator].inputs}, given)


def rows(operator: str, m: int, k: int, **attributes: Any) -> Case:
    """An operator on rows alone."""
    x = np.random.default_rng(k).standard_normal((2, m, k)).astype(np.float32)
    return Case(operator, True, {"x": x}, attributes)


def _expected_linear(inputs: Mapping[str, Array], given: Mapping[str, Any]) -> Array:
    names = ("weight_bits", "activation_bits", "weight_grid", "block_size", "activation_clip")
    return low_bit_linear(
        inputs["x"],
        inputs["weight"],
        inputs["scales"],
        n=given["N"],
        bias=inputs.get("bias"),
        diagonal=inputs.get("diagonal"),
        hadamard_size=given.get("hadamard_size", 0),
        hadamard_interleave=given.get("hadamard_interleave", 1),
        gate=given.get("gate"),
        **{name: given[name] for name in names},
    )


def _expected_attention(inputs: Mapping[str, Array], given: Mapping[str, Any]) -> tuple[Array, ...]:
    if "qkv" in inputs:
        query, key, value = split_qkv(inputs["qkv"], given["num_heads"], given["kv_num_heads"], given["head_size"])
    else:
        query, key, value = (inputs[name] for name in ("query", "key", "value"))
    found = kv_attention(
        query,
        key,
        value,
        inputs["past_key"],
        inputs["past_value"],
        inputs["seqlens_k"],
        int(inputs["total_sequence_length"]),
        inputs.get("cos_cache"),
        inputs.get("sin_cache"),
        **given,
    )
    return found.output, found.present_key, found.present_value


CASES: Mapping[str, Case] = MappingProxyType(
    {
        "gemv": linear("LowBitLinear", 1, 96, 40, exact=True),
        "gemv 3 bits, odd grid, bias": linear("LowBitLinearBias", 3, 200, 20, True, weight_grid=1, weight_bits=3),
        "gemv 2 bits": linear("LowBitLinear", 1, 320, 33, exact=True, weight_bits=2),
        "gemv 8 bits": linear("LowBitLinear", 2, 130, 70, exact=True, weight_bits=8, activation_bits=8),
        "gemv blocks": linear("LowBitLinear", 2, 160, 20, block_size=64),
        "gemm": linear("LowBitLinear", 6, 96, 40, exact=True),
        "gemm 2 bits": linear("LowBitLinear", 6, 96, 40, exact=True, weight_bits=2),
        "gemm 3 bits": linear("LowBitLinear", 7, 130, 33, exact=True, weight_bits=3, activation_bits=3),
        "gemm 8 bits, bias": linear("LowBitLinearBias", 5, 130, 70, True, weight_bits=8, activation_bits=8),
        "gemm blocks, bias": linear("LowBitLinearBias", 5, 160, 20, block_size=32, weight_bits=3),
        "gemm large tile, odd grid": linear("LowBitLinear", 70, 64, 40, exact=True, weight_grid=1),
        "gemm large tile, blocks": linear("LowBitLinear", 66, 64, 20, block_size=32),
        "hadamard gemv": linear("HadamardLowBitLinear", 1, 96, 40, exact=True),
        "hadamard gemm, bias": linear("HadamardLowBitLinearBias", 6, 96, 40, exact=True),
        "hadamard gemv, interleaved": linear("HadamardLowBitLinear", 1, 96, 40, exact=True, hadamard_interleave=3),
        "hadamard gemm, interleaved": linear("HadamardLowBitLinear", 6, 96, 40, exact=True, hadamard_interleave=12),
        "gated gemv": linear("GatedLowBitLinear", 2, 96, 24, gate="silu"),
        "gated gemm, bias": linear("GatedLowBitLinearBias", 5, 96, 40, gate="gelu_tanh", weight_bits=2),
        "hadamard gated gemv": linear("HadamardGatedLowBitLinear", 1, 64, 24, gate="silu"),
        "hadamard gated gemm, bias": linear("HadamardGatedLowBitLinearBias", 5, 64, 24, gate="gelu_tanh"),
        "float": linear("LowBitLinear", 3, 96, 40, activation_bits=16),
        "float hadamard, blocks, bias": linear(
            "HadamardLowBitLinearBias", 2, 160, 20, activation_bits=16, block_size=32
        ),
        "float hadamard, interleaved": linear(
            "HadamardLowBitLinear", 2, 96, 20, activation_bits=16, hadamard_interleave=3
        ),
        "float large tile, gated, 3 bits": linear("GatedLowBitLinear", 66, 64, 20, activation_bits=16, weight_bits=3),
        "hadamard": rows("Hadamard", 3, 96, size=32),
        "hadamard, interleaved": rows("Hadamard", 3, 96, size=32, interleave=6),
        "large hadamard": rows("Hadamard", 1, 4096, size=2048),
        "fake quantize": rows("DynamicFakeQuantize", 2, 100, bits=4, clip=0.8),
        "fake quantize, 16 bits": rows("DynamicFakeQuantize", 2, 10, bits=16),
        "prompt": attention("KVAttention", (0,), 5, 0, (4, 2, 16)),
        "prompt, window": attention("RotaryKVAttention", (0,), 20, 0, (2, 1, 16), hadamard=1, local_window_size=6),
        "decode, 3 and 8 bits": attention("RotaryKVAttention", (6, 3), 1, 4, (6, 2, 32), key_bits=3, value_bits=8),
        "decode packed, softcap": attention("PackedKVAttention", (5,), 1, 0, (2, 2, 72), value_bits=3, softcap=4.0),
        "continue packed": attention("PackedRotaryKVAttention", (5, 2), 3, 0, (4, 2, 16), hadamard=1, key_bits=8),
        "decode in parts": attention("KVAttention", (600,), 1, 8, (2, 1, 16)),
        "wide heads": attention("KVAttention", (3,), 1, 0, (2, 1, 136)),
    }
)
"""Small ones: each kernel and each way through it."""


def large_cases() -> dict[str, Case]:
    """Sizes of real models; too slow for an emulator."""
    decode = ("PackedRotaryKVAttention", (4000,), 1, 95, (32, 8, 128))
    return {
        "4096 x 4096, 1 token": linear("LowBitLinear", 1, 4096, 4096, exact=True),
        "4096 x 4096, 300 tokens": linear("LowBitLinear", 300, 4096, 4096, exact=True),
        "14336 x 4096, hadamard, 17 tokens": linear(
            "HadamardLowBitLinear", 17, 14336, 4096, exact=True, hadamard_size=2048
        ),
        "4096 x 2 x 8192, gated, 200 tokens": linear("GatedLowBitLinear", 200, 4096, 8192, gate="silu", weight_bits=2),
        "4096 x 4096, blocks, 100 tokens": linear("LowBitLinear", 100, 4096, 4096, block_size=128, activation_bits=8),
        "4096 x 4096, float, 100 tokens": linear("LowBitLinear", 100, 4096, 4096, activation_bits=16),
        "decode at 4000": attention(*decode, hadamard=1),
        "decode at 4000, 3 bits": attention(*decode, key_bits=3, value_bits=3),
        "prompt of 700": attention("PackedRotaryKVAttention", (0,), 700, 0, (16, 4, 128), hadamard=1),
        "prompt of 300, wide heads": attention("RotaryKVAttention", (0,), 300, 0, (4, 1, 256), local_window_size=100),
    }
