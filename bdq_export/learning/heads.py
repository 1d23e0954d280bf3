"""Losses at the end of a model from its last hidden states, a few rows at a time: logits of a batch are never whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bdq_export.learning.losses import Loss

_ROWS = 128
"""Rows of logits at once, several times over: 25 MB of float32 each at 49 152 words."""


@dataclass(frozen=True, eq=False)
class Heads:
    """lm_head of the quantized model and of the float one.

    Attributes:
        student: `[vocab, hidden]` of `product_dtype`, values of the quantized weight.
        teacher: the same of the float model.
    """

    student: Tensor
    teacher: Tensor

    def loss(self, loss: Loss, hidden: Tensor, teacher_hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over all rows, `[]`, differentiable by `hidden`.

        Args:
            loss: of some rows.
            hidden: outputs of the quantized model's final norm, `[rows, hidden]` float32.
            teacher_hidden: those of the float model, `[rows, hidden]`.
            labels: `[rows]`, see `Loss`.
        """
        mean: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            hidden, teacher_hidden, labels, self, loss
        )
        return mean


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, teacher_hidden: Tensor, labels: Tensor, heads: Heads, loss: Loss) -> Tensor:
        total = 0.0
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], _ROWS):
            rows = slice(start, start + _ROWS)
            logits = linear(hidden[rows].to(heads.student.dtype), heads.student).float()
            teacher = linear(teacher_hidden[rows].to(heads.student.dtype), heads.teacher).float()
            with torch.enable_grad():
                leaf = logits.requires_grad_(gradient is not None)
                found = loss(leaf, teacher, labels[rows])
            total += float(found.detach())
            if gradient is not None:
                (by_logits,) = torch.autograd.grad(found, leaf)
                gradient[rows] = (by_logits.to(heads.student.dtype) @ heads.student).float()
        count = hidden.shape[0]
        if gradient is not None:
            ctx.save_for_backward(gradient / count)
        return hidden.new_tensor(total / count)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (by_hidden,) = ctx.saved_tensors
        return by_hidden * gradient, None, None, None, None
