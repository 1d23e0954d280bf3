"""Where the student's products get their weights: made once, or again whenever they are read.

In bfloat16 the codes of all blocks take two bytes a parameter. Where a model's blocks are streamed they are not held:
a forward makes those of one linear at a time, and a block that is computed again for its gradient keeps its own until
the gradient has come through.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bdq_export.learning.parameters import Parameters
from bdq_export.learning.scaled_product import ScaledWeight
from bdq_export.learning.state import QuantizedModel
from bdq_export.scratch import Scratch

WeightSource = Callable[[], ScaledWeight]


class WeightSources:
    """The weights of a quantized model as products read them.

    Args:
        state: the model.
        parameters: of `initial_parameters` for `state`.
        dtype: of products.
        scratch: None holds the operands of all weights. Otherwise those of quantized weights are made of their codes at
            each call, the same to the last bit, and the other weights lie in here.
    """

    def __init__(
        self, state: QuantizedModel, parameters: Parameters, dtype: torch.dtype, scratch: Scratch | None
    ) -> None:
        self._state, self._parameters, self._dtype, self._scratch = state, parameters, dtype, scratch

    def __call__(self, name: str) -> WeightSource:
        """What gives the weight `name` of a linear."""
        quantized = self._state.quantized.get(name)
        if quantized is None:
            values = self._kept(self._state.weights[name].to(self._dtype))
            return partial(ScaledWeight.of_float, values, self._dtype)
        make = partial(ScaledWeight.of, quantized, self._parameters.scales[name], self._dtype)
        return make if self._scratch is not None else partial(_itself, make())

    def _kept(self, values: Tensor) -> Tensor:
        if self._scratch is None:
            return values
        # NumPy has no bfloat16.
        bits = values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)
        return torch.from_numpy(self._scratch.keep(bits.numpy())).view(values.dtype)


def _itself(weight: ScaledWeight) -> ScaledWeight:
    return weight
