"""A float64 forward pass of transformers' models, and random transforms."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bdq_export.float_model import load_float_model, locate_linear
from bdq_export.transform import Transforms, online_by_path, random_hadamard
from bdq_export.transform.channels import consumer_channels, tie
from bdq_export.transform.hadamard import hadamard
from bdq_models import Edge, Side, Tie
from bdq_runtime.specs import OnlineTransform


def _online(transform: OnlineTransform) -> Callable[[Any, Any], Tensor]:
    """A hook that applies an online transform in float64, without its integer grid."""
    matrix = hadamard(transform.hadamard_size)

    def hook(_module: Any, inputs: tuple[Tensor]) -> Tensor:
        x = inputs[0]
        if transform.kronecker is not None:
            left, right = transform.kronecker.left, transform.kronecker.right
            whole = np.kron(left.astype(np.float64), np.eye(x.shape[-1] // len(left)) if right is None else right)
            return x @ torch.from_numpy(whole).double()
        channels, runs = x.shape[-1], transform.interleave
        x = x[..., [run * (channels // runs) + place for place in range(channels // runs) for run in range(runs)]]
        rotated = (x.reshape(*x.shape[:-1], -1, transform.hadamard_size) @ matrix).reshape(x.shape)
        return rotated if transform.diagonal is None else rotated * torch.from_numpy(transform.diagonal).double()

    return hook


def _exact_logits(tiny: Any, weights: dict[str, Tensor], transforms: Transforms | None = None) -> Tensor:
    model = load_float_model(tiny, weights).double()
    modules = {}
    for path, transform in online_by_path(tiny.architecture, transforms or Transforms()).items():
        modules[locate_linear(tiny.architecture, tiny.dimensions, path).module] = transform
    for module, transform in modules.items():
        model.get_submodule(module).register_forward_pre_hook(_online(transform))
    offset = tiny.architecture.norm_offset

    # transformers' norms round to float32 inside, which would hide an error below 1e-7.
    def forward(self: Any, x: Tensor) -> Tensor:
        eps = getattr(self, "variance_epsilon", None) or self.eps
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (self.weight + offset)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)
    tokens = torch.randint(0, tiny.dimensions.vocab_size, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        logits = model(tokens).logits
    assert logits.dtype == torch.float64
    return logits


@pytest.fixture
def exact_logits() -> Callable[..., Tensor]:
    """`exact_logits(tiny, weights, transforms=None)`: logits of 2 x 24 random tokens, float64 throughout.

    With `transforms`, linears apply the online ones to their inputs.
    """
    return _exact_logits


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference over the largest expected entry."""
    return lambda got, expected: ((got - expected).abs().amax() / expected.abs().amax()).item()


def _random_transforms(
    tiny: Any, seed: int = 0, rotations: bool = True, edges: Any = None, online: bool = False, signs: bool = False
) -> Transforms:
    dimensions, architecture = tiny.dimensions, tiny.architecture
    generator = torch.Generator().manual_seed(seed)

    def sign(edge: Edge) -> Tensor:
        if not signs or edge.tie is Tie.ROPE_PAIRS:
            return torch.ones(1, dtype=torch.float64)
        return torch.randint(0, 2, (dimensions.free_channels(edge),), generator=generator).double() * 2 - 1

    def transform(edge: Edge) -> OnlineTransform:
        channels = consumer_channels(edge, dimensions)
        diagonal = torch.randn(channels, generator=generator).exp()
        runs = dimensions.heads if edge.name == "value" else 1
        return OnlineTransform(channels & -channels, diagonal.numpy(), interleave=runs)

    def diagonals() -> dict[tuple[int, str], Tensor]:
        return {
            (layer, edge.name): tie(
                edge,
                dimensions,
                torch.randn(dimensions.free_channels(edge), generator=generator, dtype=torch.float64).exp(),
            )
            * sign(edge)
            for layer in range(dimensions.layers)
            for edge in architecture.edges
            if edges is None or edge.name in edges
        }

    residual = rotations and architecture.residual_rotation
    return Transforms(
        diagonals=diagonals(),
        diagonals_before=diagonals(),
        residual_rotation=random_hadamard(dimensions.hidden_size, seed) if residual else None,
        head_rotations={
            layer: torch.stack(
                [
                    torch.rand(dimensions.head_dim, generator=generator).double().add(0.5).diag()
                    @ random_hadamard(dimensions.head_dim, 100 * layer + head)
                    for head in range(dimensions.kv_heads)
                ]
            )
            for layer in range(dimensions.layers if rotations else 0)
        },
        online={
            (layer, edge.name): transform(edge)
            for layer in range(dimensions.layers if online else 0)
            for edge in architecture.edges
            if edge.consumer_side is Side.INPUT
        },
    )


@pytest.fixture
def random_transforms() -> Callable[..., Transforms]:
    """`random_transforms(tiny, seed=0, rotations=True, edges=None)`: every part of every edge is there."""
    return _random_transforms
