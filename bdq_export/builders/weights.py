"""The weights of a graph: views of the canonical torch tensors under the names of the normal form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from bdq_export.errors import InvalidInputError
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
        name = f"{path}.weight"
        if len(parts) == 1:
            return ir.Tensor(self.array(f"{parts[0]}.weight").T, name=name)
        arrays = [self.array(f"{part}.weight") for part in parts]
        shape = ir.Shape((arrays[0].shape[1], sum(array.shape[0] for array in arrays)))

        def packed() -> ir.TensorProtocol:
            return ir.Tensor(np.concatenate(arrays).T, name=name)

        # Not cached: quantization reads the parts and never the packed float matrix, so it need not exist.
        return ir.LazyTensor(packed, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def head_matrix(self) -> ir.TensorProtocol:
        """The weight of lm_head as `[K, N]`: its own, or the embedding's transposed."""
        head = self.architecture.lm_head
        if not self.tied:
            return self.matrix(head, [head])
        return ir.Tensor(self.array(f"{self.architecture.embedding}.weight").T, name=f"{head}.weight")

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
