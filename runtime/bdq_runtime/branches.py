"""Whether a graph can continue one text in several ways in one run."""

from __future__ import annotations

import numpy as np

from bdq_runtime.model import LanguageModel

_PROMPT, _ROWS = (1, 2, 3), ((0, 1), (2, 0))
_DIFFERENCE = 1e-2  # of the largest logit: other sums, not another text


def accepts_branches(model: LanguageModel) -> bool:
    """Whether `model.branch` gives what the rows give one by one.

    The first call tries it on a few tokens, which empties the cache; `model` remembers the answer.

    `bdq::KVAttention` accepts rows after a shared past; GroupQueryAttention refuses them, and so does a graph whose
    batch is 1. The comparison is for graphs that accept them and mix them up.
    """
    if model.branches is None:
        model.branches = _try(model)
    return model.branches


def _try(model: LanguageModel) -> bool:
    model.reset()
    model.append(_PROMPT)
    try:
        found = model.branch(np.asarray(_ROWS))  # first: most graphs refuse in their first layer
    except Exception:  # onnxruntime's own classes
        model.reset()
        return False
    expected = []
    for row in _ROWS:
        model.truncate(len(_PROMPT))
        expected.append(model.append(row, all_logits=True).copy())
    model.reset()
    alone = np.stack(expected)
    return found.shape == alone.shape and bool(np.abs(found - alone).max() <= _DIFFERENCE * np.abs(alone).max())
