"""A transform of value heads that need not be orthogonal, because both sides of it are folded: v_proj and o_proj.

With inputs of covariance X and weights of Gram matrix S (`WᵀW`), noise of equal size on every channel of `x M` costs
`tr(MᵀXM) · tr(M⁻¹SM⁻ᵀ)`. The least is at `MMᵀ = G`, the geometric mean of `X⁻¹` and `S`: then both traces see the
same matrix. It is the closed-form diagonal for matrices instead of numbers. What is left free, a rotation, makes all
channels equally energetic: eigenvectors, then a Hadamard transform.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.transform import random_hadamard
from bdq_models import Architecture, Dimensions

_RIDGE = 1e-2
"""Added to both matrices, as a share of the mean of their diagonals: no channel is scaled by more than it can bear."""


def aligned_heads(
    architecture: Architecture, dimensions: Dimensions, weights: Mapping[str, Tensor], runner: BlockRunner, seed: int
) -> dict[int, Tensor]:
    """Layer -> M, float64 `[kv_heads, head_dim, head_dim]`, of the model that `runner` runs.

    Args:
        architecture: its family.
        dimensions: its sizes.
        weights: what it computes with.
        runner: over calibration tokens.
        seed: of the rotations.
    """
    found = {}
    hidden = runner.embedded()
    for layer in range(dimensions.layers):
        path = architecture.layer_path(layer, architecture.edge("value").consumers[0])
        covariance = torch.zeros(dimensions.heads, dimensions.head_dim, dimensions.head_dim, dtype=torch.float64)

        def add(_path: str, inputs: Tensor, total: Tensor = covariance) -> None:
            heads = inputs.reshape(-1, dimensions.heads, dimensions.head_dim).float().transpose(0, 1)
            with torch.autocast("cpu", enabled=False):
                total += heads.transpose(1, 2) @ heads

        hidden = runner.run(layer, hidden, add, (path,))
        parallel.add_up(covariance)
        rows = weights[f"{path}.weight"].double().reshape(-1, dimensions.heads, dimensions.head_dim).transpose(0, 1)
        gram = rows.transpose(1, 2) @ rows
        found[layer] = torch.stack(
            [
                alignment(x, s, seed + 1 + layer)
                for x, s in zip(_by_group(covariance, dimensions), _by_group(gram, dimensions), strict=True)
            ]
        )
    return found


def alignment(covariance: Tensor, gram: Tensor, seed: int) -> Tensor:
    """M `[K, K]` float64 of one head, scaled to determinant ±1; a random rotation where a side is all zeros."""
    size = covariance.shape[0]
    rotation = random_hadamard(size, seed)
    if not float(covariance.diagonal().sum()) > 0 or not float(gram.diagonal().sum()) > 0:
        return rotation
    x, s = _ridged(covariance), _ridged(gram)
    root = _power(x, 0.5)
    inverse = _power(x, -0.5)
    mean = inverse @ _power(root @ s @ root, 0.5) @ inverse
    half = _power(mean, 0.5)
    half = half / torch.linalg.slogdet(half).logabsdet.div(size).exp()
    _, vectors = torch.linalg.eigh(half @ x @ half)
    # The signs of eigenvectors are the solver's choice; these are the same everywhere.
    signs = torch.where(vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)
    result: Tensor = half @ (vectors * signs) @ rotation
    return result


def _by_group(heads: Tensor, dimensions: Dimensions) -> Tensor:
    """`[heads, K, K]` summed over the query heads that read one value head."""
    return heads.reshape(dimensions.kv_heads, dimensions.group, *heads.shape[1:]).sum(1)


def _ridged(matrix: Tensor) -> Tensor:
    result = matrix.double() / matrix.diagonal().double().mean()
    result.diagonal().add_(_RIDGE)
    return result


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    result: Tensor = (vectors * values.clamp_min(1e-12).pow(exponent)) @ vectors.T
    return result
