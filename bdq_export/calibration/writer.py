"""The model that writes calibration text: a copy in bfloat16 where the processor multiplies it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bdq_export.calibration.precision import has_fast_bfloat16
from bdq_export.streamed_blocks import StreamedBlocks, streamed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from bdq_export.scratch import Scratch


def text_writer(model: PreTrainedModel) -> PreTrainedModel:
    """`model`, or a copy, that decodes fast: each token reads all weights, and half the bytes take half the time.

    A model whose blocks are streamed is copied into a temporary file, which is mapped: for each token its blocks would
    be made again.
    """
    dtype = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    blocks = streamed(model)
    if blocks is not None:
        return _mapped(model, blocks, dtype)
    if dtype is torch.float32:
        return model
    writer = copy.deepcopy(model)
    writer.bfloat16()
    return writer


def _mapped(model: PreTrainedModel, blocks: StreamedBlocks, dtype: torch.dtype) -> PreTrainedModel:
    # No parameter is copied here: every one is replaced below.
    writer = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    modules = list(model.get_submodule(blocks.path).children())
    for layer, block in enumerate(writer.get_submodule(blocks.path).children()):
        block._forward_pre_hooks.clear()  # those that load the blocks of `model`
        blocks.load(layer)
        for name, parameter in modules[layer].named_parameters():
            _set(block, name, _on_disk(parameter, dtype, blocks.scratch))
    tied: dict[int, Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(f"{blocks.path}."):
            if id(parameter) not in tied:
                tied[id(parameter)] = _on_disk(parameter, dtype, blocks.scratch)
            _set(writer, name, tied[id(parameter)])
    return writer.bfloat16() if dtype is torch.bfloat16 else writer  # the buffers


def _on_disk(parameter: Tensor, dtype: torch.dtype, scratch: Scratch) -> Parameter:
    values = parameter.detach().to(dtype)
    raw = values.view(torch.int16 if dtype is torch.bfloat16 else torch.int32).numpy()
    return Parameter(torch.from_numpy(scratch.keep(raw)).view(dtype), requires_grad=False)


def _set(module: Module, name: str, parameter: Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter
