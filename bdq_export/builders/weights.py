"""The weights of a graph: views of the canonical torch tensors under the names of the normal form.

Of lazy weights, matrices are tensors that are made each time they are read; gains, biases and the embedding are held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_export.errors import InvalidInputError
from bdq_export.lazy_weights import LazyWeights
from bdq_models import Architecture

if TYPE_CHECKING:
    from torch import Tensor


class UnusedWeightError(InvalidInputError):
    """A weight that the graph has no place for."""


class WeightSource:
    """Canonical float32 weights; knows which of them the graph has taken."""

    def __init__(self, architecture: Architecture, weights: Mapping[str, Tensor]) -> None:
        """Wrap `weights` (canonical names, float32, CPU); nothing is copied."""
        self.architecture = architecture
        self._weights = weights
        self._taken: set[str] = set()

    def __contains__(self, name: object) -> bool:
        """Whether there is a weight called `name`."""
        return name in self._weights

    @property
    def tied(self) -> bool:
        """Whether lm_head has no weight of its own."""
        return f"{self.architecture.lm_head}.weight" not in self._weights

    def array(self, name: str) -> npt.NDArray[np.float32]:
        """The weight `name` as a numpy view of the torch tensor.

        Raises:
            InvalidInputError: there is no such weight, or it is not float32.
        """
        tensor = self._weights.get(name)
        if tensor is None:
            raise InvalidInputError(f"weight {name} is missing; the config asks for it")
        array: npt.NDArray[np.float32] = tensor.detach().numpy()
        if array.dtype != np.float32:
            raise InvalidInputError(f"weight {name} is {array.dtype}, expected float32")
        self._taken.add(name)
        return array

    def matrix(self, path: str, parts: Sequence[str]) -> ir.TensorProtocol:
        """The weight of a linear as `[K, N]`: a transposed view, or for several parts a tensor made when it is read.

        Args:
            path: module path of the linear; the tensor is called `<path>.weight`.
            parts: logical paths whose rows follow one another.
        """
        return self._transposed(f"{path}.weight", [f"{part}.weight" for part in parts])

    def head_matrix(self) -> ir.TensorProtocol:
        """The weight of lm_head as `[K, N]`: its own, or the embedding's transposed."""
        head = f"{self.architecture.lm_head}.weight"
        return self._transposed(head, [f"{self.architecture.embedding}.weight" if self.tied else head])

    def _transposed(self, name: str, parts: Sequence[str]) -> ir.TensorProtocol:
        lazy = isinstance(self._weights, LazyWeights)
        if len(parts) == 1 and not lazy:
            return ir.Tensor(self.array(parts[0]).T, name=name)
        shapes = [self._shape(part) for part in parts]

        def made() -> ir.TensorProtocol:
            arrays = [self.array(part) for part in parts]
            return ir.Tensor((arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).T, name=name)

        # Not cached: quantization reads the parts and never the packed float matrix, so it need not exist.
        shape = ir.Shape((shapes[0][1], sum(shape[0] for shape in shapes)))
        return ir.LazyTensor(made, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def _shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight that the graph takes, which lazy weights are not made for."""
        if not isinstance(self._weights, LazyWeights):
            return self.array(name).shape
        if name not in self._weights:
            raise InvalidInputError(f"weight {name} is missing; the config asks for it")
        self._taken.add(name)
        return self._weights.shape(name)

    def bias(self, path: str, parts: Sequence[str]) -> ir.TensorProtocol:
        """The bias `<path>.bias` of a linear, `[N]`."""
        arrays = [self.array(f"{part}.bias") for part in parts]
        return ir.Tensor(arrays[0] if len(arrays) == 1 else np.concatenate(arrays), name=f"{path}.bias")

    def gain(self, name: str) -> ir.TensorProtocol:
        """The gain of a norm: the stored weight plus the family's offset."""
        array = self.array(name)
        offset = np.float32(self.architecture.norm_offset)
        return ir.Tensor(array + offset if offset else array, name=name)

    def require_all_taken(self) -> None:
        """Check that the graph computes with every weight.

        Raises:
            UnusedWeightError: the graph has no place for a weight.
        """
        left = [name for name in self._weights if name not in self._taken]
        if left:
            raise UnusedWeightError(
                f"weight {left[0]} has no place in the graph of a {self.architecture.name} model; {len(left)} such "
                "weights: config.json does not belong to this checkpoint"
            )
