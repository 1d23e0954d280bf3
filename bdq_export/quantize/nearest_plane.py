"""Round a column of a weight when errors of its rows are not independent: each row makes up for those before it.

GPTQ rounds a column's rows as if the loss were a sum over rows. Where it is `tr(G E H Eᵀ)`, with G the curvature of the
loss by the outputs, an error of one row is worth less or more together with that of another. With `G⁻¹ = Uᵀ D U`, U
unit upper triangular, this is what GPTQ does along columns, done once more along rows: Babai's nearest plane on
`G ⊗ H` (YAQA, arXiv 2505.22988, rounds with the same two-sided feedback). Outside of a column nothing changes, because
what all rows of it hand on is `value - rounded` again.

Rows are taken one after the other, so this is compiled: a loop over rows in Python costs a thousand times as much.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bdq_export.quantize.grid import round_codes
from bdq_runtime.packing import ODD, QuantSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bdq_runtime.packing import Array


class NearestPlane:
    """Rounds columns whose rows are coupled in groups of consecutive rows.

    Args:
        factors: unit upper triangular `U` `[n, n]` of each group, `G⁻¹ = Uᵀ D U`; their sizes add up to all rows.
    """

    def __init__(self, factors: Sequence[Tensor]) -> None:
        self._factors = [factor.float().contiguous().numpy() for factor in factors]
        ends = list(accumulate(len(factor) for factor in factors))
        self._rows = [slice(end - len(factor), end) for end, factor in zip(ends, factors, strict=True)]
        self._work = np.empty(ends[-1], np.float32)
        self._round = _round_rows()
        threads = min(len(factors), torch.get_num_threads())
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def codes(self, values: Tensor, steps: Tensor, zeros: Tensor, spec: QuantSpec) -> Tensor:
        """Codes `[N]` float32 of a column.

        Args:
            values: `[N]` float32, one of each row; left as they are.
            steps: distance of two levels of each row, `[N]`.
            zeros: zero points `[N]`, as `Grid` has them.
            spec: bits and kind of grid.
        """
        result = torch.empty_like(values)
        arrays = [each.contiguous().numpy() for each in (values, steps, zeros)]
        top, odd, codes = np.float32((1 << spec.bits) - 1), spec.grid == ODD, result.numpy()

        def round_group(rows: slice, factor: Array) -> None:
            self._round(*(each[rows] for each in arrays), factor, top, odd, codes[rows], self._work[rows])

        # Groups have nothing to do with each other, and compiled code leaves the interpreter to other threads.
        run = map if self._pool is None else self._pool.map
        for _ in run(round_group, self._rows, self._factors):
            pass
        return result


def plain_codes(values: Tensor, steps: Tensor, zeros: Tensor, spec: QuantSpec) -> Tensor:
    """What `NearestPlane.codes` gives where all factors are the identity: each row rounded to nearest."""
    return round_codes(torch.div(values, steps), zeros, spec)


@cache
def _round_rows() -> Callable[..., None]:
    """The loop over rows, compiled when it is first needed."""
    import numba

    def round_rows(
        values: Array, steps: Array, zeros: Array, factor: Array, top: Any, odd: bool, codes: Array, rest: Array
    ) -> None:
        rest[:] = values
        for row in range(len(rest)):
            scaled = rest[row] / steps[row]
            code = np.rint(scaled + zeros[row]) if odd else np.rint(scaled) + zeros[row]
            code = min(max(code, np.float32(0)), top)
            codes[row] = code
            error = rest[row] - (code - zeros[row]) * steps[row]
            # Slices have indices that cannot be negative: four times as fast as indices into the whole.
            after, coupled = rest[row + 1 :], factor[row, row + 1 :]
            for other in range(after.size):
                after[other] -= error * coupled[other]

    compiled: Callable[..., None] = numba.njit(round_rows, nogil=True)
    return compiled
