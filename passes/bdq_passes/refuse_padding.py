"""Turn batches that the graph would compute wrongly into an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from bdq_passes.graph_edit import initializer, required_input
from bdq_passes.graph_pass import GraphPass
from bdq_passes.keep_last_logits import INPUT as LOGITS_TO_KEEP
from bdq_passes.levels import Level

LEFT = "attention_mask_is_padded_on_the_left__pad_on_the_right_instead"
RIGHT = "last_position_is_padding__feed_logits_to_keep_0_and_pick_the_rows"
_SEQUENCE_LENGTHS = 5
"""Input of GroupQueryAttention: valid tokens of each row minus one, `[batch]` int32."""


@dataclass(frozen=True)
class RefusePaddingPass(GraphPass):
    """Refuse a left-padded batch, and a right-padded one whose logits at the last position are asked for.

    GroupQueryAttention counts the valid tokens of a row and takes them to be its *first* ones, so a left-padded row is
    silently wrong. A right-padded row is right, but its last position is padding: wrong logits where only the last are
    kept. Both become an out-of-range Gather, whose error text carries the node's name:

        left  = Gather([0], 1 - attention_mask[:, 0])
        right = Gather([0], (1 - attention_mask[:, -1]) * min(logits_to_keep, 1))     only after keep-last-logits
        seqlens_k = seqlens_k + left + right                                         so that neither is dead

    An out-of-range index is an error on the CPU; CUDA gives 0 instead, so there the batch is *not* refused.

    Requires FLOAT, ensures FLOAT (and so keeps ANNOTATED). A graph without GroupQueryAttention is left alone.
    """

    name: ClassVar[str] = "refuse-padding"
    takes: ClassVar[Level] = Level.FLOAT
    gives: ClassVar[Level] = Level.FLOAT

    mask: str = "attention_mask"

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the guards.

        Raises:
            ValueError: no input of the mask's name, or sequence lengths that are not computed from it.
        """
        names = {node.name for node in model.graph}
        attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
        if LEFT in names or not attention:
            return ir.passes.PassResult(model, modified=False)
        inputs = {value.name: value for value in model.graph.inputs}
        if self.mask not in inputs:
            raise ValueError(f"no graph input {self.mask}: padding cannot be recognised")
        zeros = self._guard(model, inputs[self.mask], "left", LEFT, None)
        if LOGITS_TO_KEEP in inputs:
            zeros += self._guard(model, inputs[self.mask], "right", RIGHT, inputs[LOGITS_TO_KEEP])
        model.graph.insert_before(model.graph[0], zeros)
        guards = [node.outputs[0] for node in zeros if node.name in (LEFT, RIGHT)]
        for lengths in dict.fromkeys(required_input(node, _SEQUENCE_LENGTHS) for node in attention):
            _add(model, lengths, guards)
        return ir.passes.PassResult(model, modified=True)

    def _guard(self, model: ir.Model, mask: ir.Value, side: str, name: str, keep: ir.Value | None) -> list[ir.Node]:
        """Nodes whose last one gives `[batch]` int32 zeros, or fails where the mask is 0 at that end."""
        column = initializer(model, f"padding/{side}/column", np.array(0 if side == "left" else -1, np.int64))
        one = initializer(model, "padding/one", np.array(1, np.int64))
        zero = initializer(model, "padding/zero", np.array([0], np.int32))
        valid = ir.node("Gather", [mask, column], {"axis": 1}, name=f"padding/{side}/valid")
        padded = ir.node("Sub", [one, valid.outputs[0]], name=f"padding/{side}/padded")
        nodes = [valid, padded]
        if keep is not None:
            kept = ir.node("Min", [keep, one], name=f"padding/{side}/kept")
            nodes += [kept, ir.node("Mul", [padded.outputs[0], kept.outputs[0]], name=f"padding/{side}/wrong")]
        nodes.append(ir.node("Gather", [zero, nodes[-1].outputs[0]], {"axis": 0}, name=name))
        for node in nodes:
            node.outputs[0].name = f"{node.name}/output"
        return nodes


def _add(model: ir.Model, lengths: ir.Value, guards: list[ir.Value]) -> None:
    """Replace `lengths` by itself plus the guards, for every reader."""
    producer = lengths.producer()
    if producer is None:
        raise ValueError(f"the sequence lengths {lengths.name} of GroupQueryAttention are not computed from the mask")
    readers = lengths.uses()
    total = lengths
    anchor = producer
    for index, guard in enumerate(guards):
        node = ir.node("Add", [total, guard], name=f"padding/{lengths.name}/add_{index}")
        node.outputs[0].name = f"{node.name}/output"
        node.outputs[0].type, node.outputs[0].shape = lengths.type, lengths.shape
        model.graph.insert_after(anchor, node)
        total, anchor = node.outputs[0], node
    for reader, position in readers:
        reader.replace_input_with(position, total)
