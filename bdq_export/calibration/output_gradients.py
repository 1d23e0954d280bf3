"""How the model's predictions react to the outputs of its linears: gradients of the likelihood of its own labels.

With labels drawn from the model's distributions, the second moment of a gradient is the Fisher information, which is
the curvature of KL(float ‖ quantized): to second order a small error of the outputs costs half of it.

Blocks are run backwards one at a time, each recomputed from its stored input: memory is one block's activations plus
`4 * layers * tokens * hidden` bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.precision import fast_matmuls
from bdq_export.calibration.sites import Site, block_sites
from bdq_export.fake_quant import apply_online
from bdq_export.fake_quant.rounding import straight_through
from bdq_export.float_model import locate_linear
from bdq_models import Architecture, Dimensions
from bdq_runtime.specs import OnlineTransform

_ROWS = 128
"""Rows of logits at a time."""


@dataclass(frozen=True, eq=False)
class SiteGradients:
    """What a site reads, and what its outputs do to the predictions.

    Attributes:
        site: the linears.
        inputs: `[tokens, K]` float32, after the site's online transform.
        gradients: canonical path -> `[tokens, N]` float32, of the summed log-likelihood of all later labels.
    """

    site: Site
    inputs: Tensor
    gradients: Mapping[str, Tensor]


def site_gradients(
    runner: BlockRunner,
    architecture: Architecture,
    dimensions: Dimensions,
    online: Mapping[str, OnlineTransform],
    seed: int,
) -> Iterator[tuple[SiteGradients, ...]]:
    """The sites of each block, from the last block to the first.

    Args:
        runner: of a float model whose inputs nothing else transforms.
        architecture: its family.
        dimensions: its sizes.
        online: what each linear applies to its input first, by canonical path.
        seed: of the labels.
    """
    with _transforming(runner, architecture, dimensions, online):
        hidden = [runner.embedded()]
        for layer in range(dimensions.layers):
            hidden.append(runner.run(layer, hidden[-1]))
        gradient = _label_gradient(runner, hidden.pop(), seed)
        for layer in reversed(range(dimensions.layers)):
            found, gradient = _through_block(runner, architecture, dimensions, layer, hidden.pop(), gradient)
            yield found


@contextmanager
def _transforming(
    runner: BlockRunner, architecture: Architecture, dimensions: Dimensions, online: Mapping[str, OnlineTransform]
) -> Iterator[None]:
    """Apply `online` transforms, whose fine grid gradients go through."""
    with ExitStack() as stack:
        modules = {locate_linear(architecture, dimensions, path).module: each for path, each in online.items()}
        for module, transform in modules.items():
            handle = runner.model.get_submodule(module).register_forward_pre_hook(_online_hook(transform))
            stack.callback(handle.remove)
        yield


def _online_hook(transform: OnlineTransform) -> Callable[[Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (apply_online(inputs[0].float(), transform, straight_through), *inputs[1:])

    return hook


def _label_gradient(runner: BlockRunner, hidden: Tensor, seed: int) -> Tensor:
    """Gradient, at the outputs `hidden` of the last block, of the log-likelihood of labels drawn from the model."""
    norm, head = runner.ends()
    generator = torch.Generator().manual_seed(seed)
    gradients: list[Tensor] = []
    with torch.enable_grad():
        for rows in torch.split(hidden.flatten(0, 1), _ROWS):
            leaf = rows.clone().requires_grad_()
            likelihoods = torch.log_softmax(head(norm(leaf)).float(), -1)
            labels = torch.multinomial(likelihoods.detach().exp(), 1, generator=generator)
            gradients += torch.autograd.grad(likelihoods.gather(-1, labels).sum(), leaf)
    return torch.cat(gradients).reshape(hidden.shape)


def _through_block(
    runner: BlockRunner,
    architecture: Architecture,
    dimensions: Dimensions,
    layer: int,
    hidden: Tensor,
    gradient: Tensor,
) -> tuple[tuple[SiteGradients, ...], Tensor]:
    """The sites of a block, and the gradient at its input, from the gradient at its output."""
    sites = block_sites(architecture, dimensions, layer)
    inputs: dict[str, list[Tensor]] = {}
    outputs: dict[str, list[Tensor]] = {}
    before = []
    slices = {path: locate_linear(architecture, dimensions, path) for site in sites for path in site.paths}
    with ExitStack() as stack, fast_matmuls():
        for name in dict.fromkeys(each.module for each in slices.values()):
            hook = _recorder(inputs.setdefault(name, []), outputs.setdefault(name, []))
            stack.callback(runner.model.get_submodule(name).register_forward_hook(hook).remove)
        for leaf, result, above in runner.run_with_gradients(layer, hidden, gradient):
            torch.autograd.backward(result, above)
            assert leaf.grad is not None
            before.append(leaf.grad)
    found = []
    grads = {name: torch.cat([_rows(_grad(each)) for each in parts]) for name, parts in outputs.items()}
    for site in sites:
        parts = {path: grads[slices[path].module][:, slices[path].start : slices[path].stop] for path in site.paths}
        found.append(SiteGradients(site, torch.cat([_rows(each) for each in inputs[site.module]]), parts))
    return tuple(found), torch.cat(before)


def _recorder(inputs: list[Tensor], outputs: list[Tensor]) -> Callable[[Module, tuple[Any, ...], Tensor], None]:
    def hook(_module: Module, given: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        inputs.append(given[0].detach())
        outputs.append(output)

    return hook


def _grad(output: Tensor) -> Tensor:
    # An output that nothing reads costs nothing.
    return torch.zeros_like(output) if output.grad is None else output.grad


def _rows(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).float()
