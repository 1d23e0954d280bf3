"""One decoder block with learned diagonals around its rotations, and everything rounded: gradients reach all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import linear

from bdq_export.calibration.precision import product_dtype
from bdq_export.calibration.sites import block_sites
from bdq_export.fake_quant.attention import attention_inputs
from bdq_export.learning.block_parameters import BlockParameters, factors, is_input
from bdq_export.learning.parameters import modules_of
from bdq_export.learning.straight_through import rotate, rotate_back, rotate_online, row_values, token_codes
from bdq_export.learning.weight_rounding import RowGrids
from bdq_export.quantize.grid import Grid
from bdq_export.quantize.specs import SpecOf
from bdq_export.transform import Transforms
from bdq_export.transform.kronecker import factors_of, inverse_factors, kronecker_product
from bdq_models import Architecture, Dimensions, Edge
from bdq_runtime.specs import ActivationQuantization, KVQuantization, OnlineTransform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class BlockStudent:
    """A decoder block as it will be once `parameters` are folded and its weights rounded to nearest.

    Args:
        architecture: its family.
        dimensions: its sizes.
        layer: index of the block.
        transforms: that `weights` were folded with.
        weights: canonical folded float weights.
        spec_of: how each linear is quantized.
        parameters: of `block_parameters`.
        activation: quantization of the inputs of all linears; None leaves them float.
        cache: quantization of the cache; None leaves it float.
    """

    def __init__(
        self,
        architecture: Architecture,
        dimensions: Dimensions,
        layer: int,
        transforms: Transforms,
        weights: Mapping[str, Tensor],
        spec_of: SpecOf,
        parameters: BlockParameters,
        activation: ActivationQuantization | None,
        cache: KVQuantization | None,
    ) -> None:
        self.architecture, self.dimensions, self.layer = architecture, dimensions, layer
        self.parameters, self.activation, self.cache = parameters, activation, cache
        self._online: dict[str, OnlineTransform] = {
            path: transforms.online[layer, edge.name]
            for edge in architecture.edges
            if (layer, edge.name) in transforms.online
            for path in edge.consumers
        }
        self._base: dict[str, Tensor] = {}
        self._grids: dict[str, RowGrids] = {}
        for path in architecture.linears:
            name = f"{architecture.layer_path(layer, path)}.weight"
            weight = weights[name].float()
            spec = spec_of(name.removesuffix(".weight"))
            if spec is not None:
                self._grids[path] = RowGrids.searched(weight, spec)
            self._base[path] = self._unrotated(path, weight)
        self._values: dict[str, Tensor] = {}
        self._inverse: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._last: tuple[Tensor, str, tuple[Tensor, Tensor | None]] | None = None

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        """Let the block of `model` compute with the parameters; call `refresh` after each change of them."""
        with ExitStack() as stack:
            for site in block_sites(self.architecture, self.dimensions, self.layer):
                prefix = len(f"{self.architecture.layers}.{self.layer}.")
                for name, places in modules_of(self.architecture, self.dimensions, site).items():
                    module = model.get_submodule(name)
                    paths = [path[prefix:] for path, _ in places]
                    module.forward = _BlockLinear(self, paths, module._parameters.get("bias"))
                    stack.callback(delattr, module, "forward")
            for norm in self.architecture.norms:
                path = self.architecture.layer_path(self.layer, norm)
                hook = model.get_submodule(path).register_forward_hook(self._norm_hook(norm))
                stack.callback(hook.remove)
            stack.enter_context(attention_inputs(model, self.architecture.layers, self._heads))
            self.refresh()
            stack.callback(self._forget)
            yield

    def refresh(self) -> None:
        """Make the rounded weights of the present parameters."""
        self._inverse = {name: inverse_factors(*self.parameters.kronecker(name)) for name in self.parameters.factors}
        self._values = {path: self._rounded(path) for path in self.architecture.linears}
        self._last = None

    def _forget(self) -> None:
        self._values, self._inverse, self._last = {}, {}, None

    def value(self, path: str) -> Tensor:
        """The rounded weight of the linear `path` (relative to the block), in the dtype of products."""
        return self._values[path]

    def output_factors(self, path: str) -> Tensor | None:
        """What the outputs of `path`, a linear or a norm, are multiplied with; None is 1."""
        result: Tensor | None = None
        for edge, scale, inverse in self._factors():
            each = scale if path in edge.producers else None
            if path in edge.consumers and not is_input(edge):
                each = inverse
            if each is not None:
                result = each if result is None else result * each
        return result

    def operand(self, path: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The input of the linear `path` after its online transform, and steps where it is rounded."""
        first = self._first(path)
        # q, k and v (gate and up) get the same tensor in turn.
        if self._last is None or self._last[0] is not x or self._last[1] != first:
            self._last = (x, first, self._operand(path, first, x.float()))
        return self._last[2]

    def _operand(self, path: str, first: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        online = self._online.get(path)
        if online is not None and online.kronecker is not None:
            x = kronecker_product(x, *self.parameters.kronecker(self._edge(path).name))
        elif online is not None:
            x = rotate_online(x, online)
            if online.diagonal is not None:
                x = x * self._diagonal(path, online)
        if self.activation is None:
            return x.to(product_dtype()), None
        return token_codes(x, self.parameters.clip(first), self.activation.bits, product_dtype())

    def _first(self, path: str) -> str:
        absolute = self.architecture.layer_path(self.layer, path)
        sites = block_sites(self.architecture, self.dimensions, self.layer)
        return next(site.paths[0] for site in sites if absolute in site.paths)

    def _diagonal(self, path: str, online: OnlineTransform) -> Tensor:
        return torch.from_numpy(online.diagonal) * self.parameters.after[self._edge(path).name].exp()

    def _edge(self, path: str) -> Edge:
        """The edge that ends at the inputs of the linear `path`."""
        (edge,) = (edge for edge in self.architecture.edges if is_input(edge) and path in edge.consumers)
        return edge

    def _unrotated(self, path: str, weight: Tensor) -> Tensor:
        online = self._online.get(path)
        if online is None:
            return weight
        if online.kronecker is not None:
            left, right = factors_of(online.kronecker, weight.dtype)
            return kronecker_product(weight, left.T, None if right is None else right.T)
        if online.diagonal is not None:
            weight = weight * torch.from_numpy(online.diagonal)
        return rotate_back(weight, online)

    def _factors(self) -> Iterator[tuple[Edge, Tensor, Tensor]]:
        for name, log_factors in self.parameters.before.items():
            edge = self.architecture.edge(name)
            yield edge, *factors(edge, self.dimensions, log_factors)

    def _rounded(self, path: str) -> Tensor:
        weight = self._base[path]
        for edge, _, inverse in self._factors():
            if is_input(edge) and path in edge.consumers:
                weight = weight * inverse
        weight = self._with_heads(path, weight)
        online = self._online.get(path)
        if online is not None and online.kronecker is not None:
            weight = kronecker_product(weight, *self._inverse[self._edge(path).name])
        elif online is not None:
            weight = rotate_online(weight, online)
            if online.diagonal is not None:
                weight = weight / self._diagonal(path, online)
        grids = self._grids.get(path)
        if grids is not None:
            # Factors of rows go through their scales: the codes do not change, so they are applied to the outputs.
            weight = grids.round(weight, self.parameters.rows[path])
        return weight.to(product_dtype())

    def _with_heads(self, path: str, weight: Tensor) -> Tensor:
        """`weight` of v or o with what is learned of the transform of value heads; others as they are."""
        heads, edge = self.parameters.heads, self.architecture.edge("value")
        if heads is not None and path in edge.producers:
            return _times_heads(weight, heads)
        if heads is not None and path in edge.consumers:
            columns: Tensor = weight.reshape(-1, len(heads)) @ torch.linalg.inv(heads).T
            return columns.reshape(weight.shape)
        return weight

    def bias(self, paths: list[str], bias: Tensor) -> Tensor:
        """The bias of a module that computes the linears `paths`."""
        heads, values = self.parameters.heads, self.architecture.edge("value").producers
        if heads is None or not any(path in values for path in paths):
            return bias
        parts = zip(paths, torch.split(bias, [self.dimensions.output_size(path) for path in paths]), strict=True)
        return torch.cat([_times_heads(part, heads) if path in values else part for path, part in parts])

    def grid(self, path: str, weight: Tensor) -> Grid | None:
        """The learned grid of the linear `path`, for its folded `weight` `[N, K]`; None where it stays float."""
        grids = self._grids.get(path)
        return None if grids is None else grids.grid(weight, self.parameters.rows[path])

    def _norm_hook(self, norm: str) -> Any:
        def hook(_module: Module, _inputs: Any, output: Tensor) -> Tensor:
            scale = self.output_factors(norm)
            return output if scale is None else output * scale

        return hook

    def _heads(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.cache is None or layer != self.layer:
            return query, key, value
        if self.cache.hadamard:
            query, key = rotate(query, query.shape[-1]), rotate(key, key.shape[-1])
        key_clip, value_clip = self.parameters.cache_clips()
        key = row_values(key, key_clip, self.cache.key_bits)
        return query, key, row_values(value, value_clip, self.cache.value_bits)


def _times_heads(rows: Tensor, heads: Tensor) -> Tensor:
    """Outputs of v times `heads` in each head: of its weight `[kv_heads * head_dim, K]` or its bias, `[..]` alike."""
    parts = rows.reshape(-1, len(heads), rows[0].numel())
    return (parts.transpose(1, 2) @ heads).transpose(1, 2).reshape(rows.shape)


class _BlockLinear:
    """The forward of a linear module of the block."""

    def __init__(self, student: BlockStudent, paths: list[str], bias: Tensor | None) -> None:
        self._student, self._paths, self._bias = student, paths, bias

    def __call__(self, x: Tensor) -> Tensor:
        student = self._student
        values, steps = student.operand(self._paths[0], x)
        y = torch.cat([linear(values, student.value(path)).float() for path in self._paths], -1)
        if steps is not None:
            y = y * steps
        if self._bias is not None:
            y = y + student.bias(self._paths, self._bias)
        scales = [student.output_factors(path) for path in self._paths]
        if all(scale is None for scale in scales):
            return y
        sizes = [student.dimensions.output_size(path) for path in self._paths]
        return y * torch.cat([torch.ones(n) if s is None else s for s, n in zip(scales, sizes, strict=True)])
