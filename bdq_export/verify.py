"""Does the file that was written compute what the float model computes?

The exported model is opened in ONNX Runtime by its path, as a user will, and its logits on held-back tokens are
compared with the float model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bdq_export.errors import UsageError, VerificationError
from bdq_export.scheme import FLOAT_BITS, QuantScheme

if TYPE_CHECKING:
    import torch

    from bdq_export.progress import Progress
    from bdq_runtime.model import LanguageModel

Array = npt.NDArray[Any]
Reference = Callable[[Array], Array]
"""Token ids `[L]` int64 -> logits `[L, vocab]` float32 of the float model."""

_ROWS = 64
"""Rows of logits that are compared at a time: float64 copies of a whole window of a large vocabulary would be GBs."""
_TOP1 = {2: 0.05, 3: 0.20, 4: 0.40, 8: 0.90, 16: 0.99}


@dataclass(frozen=True)
class Verification:
    """The exported model against the float model on held-back tokens; the first token of a window is unscored.

    Attributes:
        kl: mean KL(float ‖ exported) of the next-token distributions, in nats.
        top1: fraction of positions where both models think the same token likeliest.
        ppl_float: perplexity of the float model.
        ppl_quantized: perplexity of the exported model.
        tokens: number of scored tokens.
        threshold: smallest `top1` that passes.
    """

    kl: float
    top1: float
    ppl_float: float
    ppl_quantized: float
    tokens: int
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether top-1 agreement reaches the threshold and every figure is a number."""
        finite = bool(np.isfinite([self.kl, self.ppl_float, self.ppl_quantized]).all())
        return finite and self.top1 >= self.threshold

    @property
    def ppl_ratio(self) -> float:
        """Perplexity of the exported model divided by that of the float model."""
        return self.ppl_quantized / self.ppl_float

    def require(self) -> None:
        """Raise when the verification failed.

        Raises:
            VerificationError: the figures are below the threshold.
        """
        if not self.passed:
            raise VerificationError(
                f"the exported model agrees with the float model on {self.top1:.1%} of {self.tokens} tokens (KL "
                f"{self.kl:.3g}), expected at least {self.threshold:.1%}; the files are kept and marked UNVERIFIED; "
                "use more bits, a smaller block size or --min-top1"
            )


def default_min_top1(scheme: QuantScheme) -> float:
    """Smallest top-1 agreement that passes when the user gives none.

    It tells a broken export from an honest one, not a good scheme from a better. Agreement is lowest where a model is
    small and its text improbable; on SmolLM2-135M and text sampled from it at temperature 1, plain rounding in blocks
    of 32 agrees on 97 % at 8 bits, 85 % with 8-bit activations for each token, 51 to 55 % at 4 bits with a 4- or 8-bit
    head, and 0.4 % at 2 bits, which nobody can use. A wrong graph or wrongly packed weights agree on about nothing.

    | weight bits | 16 | 8 | 4 | 3 | 2 |
    |---|---|---|---|---|---|
    | threshold | 0.99 | 0.90 | 0.40 | 0.20 | 0.05 |

    Activations or a KV cache of 8 bits take 0.7 of that; fewer bits, 0.5 of the value of weights of so few bits.
    """
    lowest = min(scheme.activation_bits, scheme.kv_bits)
    weights = _TOP1[scheme.weight_bits]
    if lowest == FLOAT_BITS:
        return weights
    return round(0.7 * weights if lowest == 8 else 0.5 * min(weights, _TOP1[lowest]), 3)


def torch_reference(model: torch.nn.Module) -> Reference:
    """The logits of a transformers model as a `Reference`."""
    import torch

    def logits(tokens: Array) -> Array:
        with torch.inference_mode():
            result = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0]
        array: Array = result.float().numpy()
        return array

    return logits


def verify(
    onnx_path: Path,
    reference: Reference,
    tokens: Array,
    min_top1: float,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare the model at `onnx_path` with `reference`.

    Args:
        onnx_path: the written model, its data and side files beside it.
        reference: the float model, see `torch_reference`.
        tokens: `[windows, L]` integers, L at least 2; not the tokens that calibration used.
        min_top1: smallest top-1 agreement that passes.
        threads: of ONNX Runtime; None lets it choose.
        progress: advances once for each window.

    Raises:
        UsageError: no window, or windows of fewer than two tokens.
        VerificationError: ONNX Runtime does not open the file, or its logits are not `[L, vocab]`.
    """
    from bdq_export.progress import QuietProgress
    from bdq_runtime.model import LanguageModel

    windows = np.ascontiguousarray(tokens, np.int64)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"verification tokens are {windows.shape}, expected [windows, at least 2]")
    try:
        model = LanguageModel(onnx_path, threads=threads)
    except (ValueError, FileNotFoundError) as error:
        raise VerificationError(f"ONNX Runtime does not open the exported model: {error}") from error
    sums = _Sums()
    with (progress or QuietProgress()).stage("verify", total=len(windows)) as stage:
        for window in windows:
            expected = reference(window)
            found = _exported_logits(model, window)
            if found.shape != expected.shape:
                raise VerificationError(
                    f"logits of the exported model are {found.shape}, expected {expected.shape}; "
                    "the graph must give all positions when logits_to_keep is 0"
                )
            sums.add(expected[:-1], found[:-1], window[1:])
            stage.advance()
    return sums.result(min_top1)


def _exported_logits(model: LanguageModel, window: Array) -> Array:
    model.reset()
    try:
        return model.append(window, all_logits=True)
    except Exception as error:  # onnxruntime raises classes of a private module
        line = " ".join(str(error).split())[:300]
        raise VerificationError(f"ONNX Runtime cannot run the exported model: {line}") from error


class _Sums:
    """Running totals over scored positions."""

    def __init__(self) -> None:
        self.kl = self.same = self.nll_float = self.nll_quantized = 0.0
        self.tokens = 0

    def add(self, expected: Array, found: Array, targets: Array) -> None:
        """Add the rows of two logit matrices `[n, vocab]`, and the tokens `[n]` that came next."""
        for start in range(0, len(targets), _ROWS):
            rows = slice(start, start + _ROWS)
            p, q = _log_softmax(expected[rows]), _log_softmax(found[rows])
            index = np.arange(len(p)), targets[rows]
            self.kl += float((np.exp(p) * (p - q)).sum())
            self.same += float((p.argmax(-1) == q.argmax(-1)).sum())
            self.nll_float -= float(p[index].sum())
            self.nll_quantized -= float(q[index].sum())
            self.tokens += len(p)

    def result(self, threshold: float) -> Verification:
        n = self.tokens
        return Verification(
            kl=self.kl / n,
            top1=self.same / n,
            ppl_float=float(np.exp(self.nll_float / n)),
            ppl_quantized=float(np.exp(self.nll_quantized / n)),
            tokens=n,
            threshold=threshold,
        )


def _log_softmax(logits: Array) -> Array:
    """Log probabilities of the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted
