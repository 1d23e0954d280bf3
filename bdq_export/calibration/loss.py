"""How far a quantized model is from the float one on tokens that it was not calibrated on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROWS = 128
"""Rows of logits compared at a time: a float32 row of a large vocabulary is a megabyte."""


class HeldOutLoss:
    """Mean KL(float ‖ quantized) of the next-token distributions, in nats.

    Only the float model's last hidden states are kept; its logits are made again from them when needed.

    Args:
        model: the float model as it is now; it may be changed afterwards.
        layers: path of its decoder blocks.
        tokens: held-out tokens `[samples, seq_len]`, this process's part; may be none where others have some.
    """

    def __init__(self, model: PreTrainedModel, layers: str, tokens: Tensor) -> None:
        # float32: differences between candidates can be smaller than bfloat16's rounding.
        self._runner = BlockRunner(model, layers, tokens, fast=False)
        self._count = len(tokens)
        _, head = self._runner.ends()
        self._head = head.get_parameter("weight").detach()
        self._hidden = self._normed()

    @torch.inference_mode()
    def __call__(self) -> float:
        """The loss of what the model computes now."""
        _, head = self._runner.ends()
        total = 0.0
        count = 0
        for floats, hidden in zip(torch.split(self._hidden, _ROWS), torch.split(self._normed(), _ROWS), strict=True):
            target = torch.log_softmax(floats @ self._head.t(), -1)
            actual = torch.log_softmax(head(hidden), -1)
            total += float((target.exp() * (target - actual)).sum(-1).double().sum())
            count += floats.shape[0]
        return parallel.mean(total, count)

    @torch.inference_mode()
    def _normed(self) -> Tensor:
        if not self._count:
            return self._head.new_empty(0, self._head.shape[1])
        hidden = self._runner.embedded()
        for layer in range(len(self._runner.blocks)):
            hidden = self._runner.run(layer, hidden)
        norm, _ = self._runner.ends()
        result: Tensor = norm(hidden)
        return result.flatten(0, 1)
