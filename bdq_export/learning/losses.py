"""Losses between the next-token distributions of the quantized model, p, and a target q.

    kl            KL(q ‖ p), q the float model's distribution
    ce            -Σ q log p, q the next token of the text
    rce           -Σ (q log p + p log(δp + (1-δ)q)), the symmetric cross-entropy that the paper's text describes
    rce-printed   -Σ (q log p - p log(δp + (1-δ)q)), the paper's equation 21 as printed (arXiv 2605.18800)

The printed sign rewards p for leaving q: it is CE - H(p) - KL(p ‖ δp + (1-δ)q). Logarithms are clamped from below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST_LOG = -20.0


@dataclass(frozen=True)
class Loss:
    """What is minimised.

    Attributes:
        kind: one of `options.LOSSES`.
        delta: δ of the two reverse losses.
        target: q of the two reverse losses, one of `options.LOSS_TARGETS`.
    """

    kind: str = "kl"
    delta: float = 0.5
    target: str = "teacher"

    def __call__(self, logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The sum over rows, `[]`.

        Args:
            logits: of the quantized model, `[rows, vocab]` float32.
            teacher: of the float model, `[rows, vocab]` float32.
            labels: next token of each row, `[rows]`; where it is -1, a loss that asks for labels is 0.
        """
        log_p = torch.log_softmax(logits, -1)
        if self.kind == "kl":
            log_q = torch.log_softmax(teacher, -1)
            return (log_q.exp() * (log_q - log_p)).sum()
        by_label = self.kind == "ce" or self.target == "label"
        known = labels >= 0
        if by_label:
            q = torch.zeros_like(log_p).scatter_(-1, labels.clamp_min(0)[:, None], 1.0)
        else:
            q = torch.softmax(teacher, -1)
        rows = -(q * log_p.clamp_min(_LEAST_LOG)).sum(-1)
        if self.kind != "ce":
            p = log_p.exp()
            # Clamped before the logarithm: behind it the gradient of log(0) is infinity times 0.
            mixed = (self.delta * p + (1 - self.delta) * q).clamp_min(math.exp(_LEAST_LOG)).log()
            reverse = (p * mixed).sum(-1)
            rows = rows + reverse if self.kind == "rce-printed" else rows - reverse
        return (rows * known).sum() if by_label else rows.sum()
