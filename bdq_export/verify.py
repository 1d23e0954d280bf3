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
from bdq_export.system_errors import is_out_of_memory

if TYPE_CHECKING:
    import torch

    from bdq_export.progress import Progress

Array = npt.NDArray[Any]
Reference = Callable[[Array], Array]
"""Token ids `[L]` int64 -> logits `[L, vocab]` float32 of the float model."""

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
    from bdq_runtime.perplexity import measure_perplexity

    windows = np.ascontiguousarray(tokens, np.int64)
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"verification tokens are {windows.shape}, expected [windows, at least 2]")
    try:
        model = LanguageModel(onnx_path, threads=threads)
    except (ValueError, FileNotFoundError) as error:
        raise VerificationError(f"ONNX Runtime does not open the exported model: {error}") from error
    scored = windows[:, 1:].size
    with (progress or QuietProgress()).stage("verify", total=len(windows)) as stage:
        try:
            found = measure_perplexity(model, windows, reference, lambda _: stage.advance())
        except Exception as error:  # onnxruntime raises classes of a private module
            if is_out_of_memory(error):
                raise
            line = " ".join(str(error).split())[:300]
            raise VerificationError(f"the exported model cannot be compared with the float model: {line}") from error
    if found.scored_tokens != scored:
        raise VerificationError(
            f"the exported model gives logits of {found.scored_tokens} positions, expected {scored}; "
            "the graph must give all positions when logits_to_keep is 0"
        )
    compared = (found.kl_divergence, found.top1_agreement, found.reference_perplexity)
    kl, top1, ppl_float = (value for value in compared if value is not None)  # none is: there is a reference
    return Verification(kl, top1, ppl_float, found.perplexity, scored, min_top1)
