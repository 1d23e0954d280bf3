"""Lower linears with quantized weights to the operator that reads packed codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from bdq_passes import annotations as note
from bdq_passes.graph_edit import absorb, bias_add, remove_unused, replace_node, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.levels import CONTRIB, Level, dequantizer, weight_value
from bdq_passes.packed_weights import PackedWeight, add_packed, check_bits, read_weight

_INT8_LEVEL = 4
_FLOAT_BLOCKS = {2: (16, 256)}
"""bits -> block sizes whose kernel computes in float32 whatever the accuracy level (measured, ONNX Runtime 1.31)."""


@dataclass(frozen=True)
class LowerToMatMulNBitsPass(GraphPass):
    """Replace MatMul on a dequantized weight by `com.microsoft::MatMulNBits`, of 2, 4 or 8 bits.

        MatMul(x, DequantizeLinear(codes [K, N], scales, zero points)) [+ bias]
        ->
        MatMulNBits(x, B [N, blocks, block_size*bits/8], scales [N, blocks], zero points, -, bias)

    1. A row that is no multiple of the block is padded with code 0.
    2. One scale a row becomes the same scale for each block of the row.
    3. An Add of an `[N]` initializer that alone reads the result becomes the bias.
    4. A tied lm_head shares its initializers with the embedding's GatherBlockQuantized.
    5. Weights of 8 bits get accuracy level 4 always: below it there is no fast kernel.
    6. Never emitted, because silently wrong or refused at run time: `g_idx`, float zero points, 1, 3, 5, 6 or 7 bits.

    The node's annotation says in what type its kernel multiplies. Linears with static activations are left to
    `lower-to-qlinear-matmul`.

    Requires QUANTIZED, ensures QUANTIZED, and LOWERED as far as linears go. A second run changes nothing.

    Attributes:
        accuracy_level: 0 to 3 compute in float32; 4 quantizes activations to int8 inside the kernel.
    """

    name: ClassVar[str] = "lower-to-matmul-nbits"
    takes: ClassVar[Level] = Level.QUANTIZED
    gives: ClassVar[Level] = Level.QUANTIZED

    accuracy_level: int = _INT8_LEVEL

    def __post_init__(self) -> None:
        """Check the option.

        Raises:
            ValueError: an accuracy level outside 0..4.
        """
        if not 0 <= self.accuracy_level <= _INT8_LEVEL:
            raise ValueError(f"accuracy level is {self.accuracy_level}, expected 0 to {_INT8_LEVEL}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every linear.

        Raises:
            ValueError: bits without a kernel.
        """
        modified = False
        for node in note.with_role(model, note.LINEAR):
            dequantize = dequantizer(node)
            if dequantize is None or note.has_static_activations(node):
                continue
            weight = read_weight(node, dequantize)
            check_bits(node, weight.spec, "MatMulNBits")
            base = note.tied(node) or str(required_input(dequantize, 0).name).removesuffix("_codes")
            self._lower(model, node, add_packed(model, base, weight))
            modified = True
        model.opset_imports.setdefault(CONTRIB, 1)
        return ir.passes.PassResult(model, modified=modified)

    def _lower(self, model: ir.Model, node: ir.Node, packed: PackedWeight) -> None:
        n, k = packed.weight.codes.shape
        level = _INT8_LEVEL if packed.bits == 8 else self.accuracy_level
        added = bias_add(node)
        bias = None if added is None else added[1]
        inputs = [node.inputs[0], packed.codes, packed.scales, packed.zero_points, None, bias]
        while inputs[-1] is None:
            inputs.pop()
        attributes = {
            "K": k, "N": n, "bits": packed.bits, "block_size": packed.block_size, "accuracy_level": level,
        }  # fmt: skip
        lowered = ir.node("MatMulNBits", inputs, attributes, domain=CONTRIB, name=node.name)
        weight = weight_value(node)
        replace_node(node, lowered)
        remove_unused(model, [weight])
        if added is not None:
            absorb(lowered, added[0])
        exact = level < _INT8_LEVEL or packed.block_size in _FLOAT_BLOCKS.get(packed.bits, ())
        note.set_executed(lowered, "float32" if exact else "int8")
