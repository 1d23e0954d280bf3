"""How the model's predictions react to the outputs of its linears: gradients of the likelihood of its own labels.

With labels drawn from the model's distributions, the second moment of a gradient is the Fisher information, which is
the curvature of KL(float ‖ quantized): to second order a small error of the outputs costs half of it.

Blocks are run backwards one at a time, each recomputed from its stored input: memory is one block's activations plus
`2 * layers * tokens * hidden` bytes (4 where the processor does not multiply bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from bdq_export import parallel
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.draw import draw
from bdq_export.calibration.precision import fast_matmuls
from bdq_export.calibration.sites import Site, block_sites
from bdq_export.fake_quant import apply_online
from bdq_export.fake_quant.rounding import straight_through
from bdq_export.float_model import locate_linear
from bdq_models import Architecture, Dimensions
from bdq_runtime.specs import OnlineTransform

_ROWS = 128
"""Rows of logits at a time."""
_HELD = torch.bfloat16
"""Of the inputs of all blocks: half the memory, whatever products are computed in."""


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
    seeds: Sequence[int],
    keep: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> Iterator[Iterator[tuple[SiteGradients, ...]]]:
    """The sites of each block, from the last block to the first; of each block batch by batch of the tokens.

    Args:
        runner: of a float model whose inputs nothing else transforms.
        architecture: its family.
        dimensions: its sizes.
        online: what each linear applies to its input first, by canonical path.
        seeds: of the labels of each sequence (see `label_seeds`).
        keep: puts inputs of blocks where they are held until the block is run backwards.
    """
    with _transforming(runner, architecture, dimensions, online):
        hidden, inputs = runner.embedded(), []
        for layer in range(dimensions.layers):
            inputs.append(keep(hidden.to(_HELD)))
            hidden = runner.run(layer, hidden)
        gradient = _label_gradient(runner, hidden, seeds)
        del hidden
        for layer in reversed(range(dimensions.layers)):
            before: list[Tensor] = []
            parts = _through_block(runner, architecture, dimensions, layer, inputs.pop().float(), gradient, before)
            yield parts
            for _ in parts:
                pass
            gradient = torch.cat(before)


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


def label_seeds(seed: int, count: int) -> list[int]:
    """Seeds for this process's `count` sequences (of `parallel.shard`): the same however many processes there are."""
    return [seed + parallel.rank() + index * parallel.size() for index in range(count)]


def _label_gradient(runner: BlockRunner, hidden: Tensor, seeds: Sequence[int]) -> Tensor:
    """Gradient, at the outputs `hidden` of the last block, of the log-likelihood of labels drawn from the model."""
    norm, head = runner.ends()
    gradients: list[Tensor] = []
    for sequence, seed in zip(hidden, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        for rows in torch.split(sequence, _ROWS):
            leaf = rows.clone().requires_grad_()
            with torch.enable_grad(), fast_matmuls():
                likelihoods = torch.log_softmax(head(norm(leaf)).float(), -1)
            labels = draw(likelihoods.detach(), generator)
            gradients += torch.autograd.grad(likelihoods.gather(-1, labels).sum(), leaf)
    return torch.cat([hidden.new_empty(0, hidden.shape[-1]), *gradients]).reshape(hidden.shape)


def _through_block(
    runner: BlockRunner,
    architecture: Architecture,
    dimensions: Dimensions,
    layer: int,
    hidden: Tensor,
    gradient: Tensor,
    before: list[Tensor],
) -> Iterator[tuple[SiteGradients, ...]]:
    """The sites of a block for each batch, from the gradient at its output; that at its input goes to `before`."""
    sites = block_sites(architecture, dimensions, layer)
    slices = {path: locate_linear(architecture, dimensions, path) for site in sites for path in site.paths}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack, fast_matmuls():
        for name in dict.fromkeys(each.module for each in slices.values()):
            hook = _recorder(name, inputs, outputs)
            stack.callback(runner.model.get_submodule(name).register_forward_hook(hook).remove)
        for leaf, result, above in runner.run_with_gradients(layer, hidden, gradient):
            torch.autograd.backward(result, above)
            assert leaf.grad is not None
            before.append(leaf.grad)
            grads = {name: _rows(_grad(output)) for name, output in outputs.items()}
            outputs.clear()
            found = []
            for site in sites:
                parts = {path: grads[at.module][:, at.start : at.stop] for path in site.paths for at in (slices[path],)}
                found.append(SiteGradients(site, _rows(inputs[site.module]), parts))
            yield tuple(found)


def _recorder(
    name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]
) -> Callable[[Module, tuple[Any, ...], Tensor], None]:
    def hook(_module: Module, given: tuple[Any, ...], output: Tensor) -> None:
        output.retain_grad()
        inputs[name] = given[0].detach()
        outputs[name] = output

    return hook


def _grad(output: Tensor) -> Tensor:
    # An output that nothing reads costs nothing.
    return torch.zeros_like(output) if output.grad is None else output.grad


def _rows(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).float()
