"""Decoder blocks that get their weights when they run and lose them when another block does.

For models larger than memory: of the torch model only embedding, final norm, lm_head and one block are held. A hook in
front of each block makes its weights from whatever they were set to last, so a forward of a whole model, or of one
block over many batches, needs to know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from bdq_export.errors import InvalidInputError
from bdq_export.lazy_weights import layer_of
from bdq_export.process_memory import give_back_memory
from bdq_export.scratch import Scratch
from bdq_models import Architecture, Dimensions, split_rows

_STREAMED: WeakKeyDictionary[Module, StreamedBlocks] = WeakKeyDictionary()


class StreamedBlocks:
    """The blocks of one torch model.

    Args:
        blocks: of a model whose parameters are on the meta device.
        architecture: its family.
        dimensions: its sizes.
        scratch: for what is made of all weights.

    Attributes:
        path: of the blocks in the model.
        scratch: as given.
    """

    def __init__(
        self, blocks: list[Module], architecture: Architecture, dimensions: Dimensions, scratch: Scratch
    ) -> None:
        self.path, self.scratch = architecture.layers, scratch
        self._blocks, self._architecture, self._dimensions = blocks, architecture, dimensions
        self._sources: list[dict[str, Mapping[str, Tensor]]] = [{} for _ in blocks]
        self._loaded: set[int] = set()
        self._held = False
        self._without: frozenset[str] = frozenset()
        self._empty = [_parameters(block) for block in blocks]
        for layer, block in enumerate(blocks):
            block.register_forward_pre_hook(self._hook(layer))

    def replace(self, weights: Mapping[str, Tensor]) -> None:
        """Use `weights` from now on; names that are not given stay as they are, those outside of blocks are ignored.

        Nothing is read before a block runs.

        Args:
            weights: canonical names; all of a block's must have been given before it runs.
        """
        for name in weights:
            layer = layer_of(self._architecture, name)
            if layer is None:
                continue
            if layer >= len(self._blocks):
                raise InvalidInputError(f"weight {name} does not belong to a model of {len(self._blocks)} layers")
            # Of a dict, one tensor must not keep all others in memory; other mappings make what is asked for.
            self._sources[layer][name] = {name: weights[name]} if isinstance(weights, dict) else weights
            self._release(layer)

    def load(self, layer: int) -> None:
        """Give block `layer` its weights, if it has not got them; all others lose theirs."""
        if layer in self._loaded:
            return
        if not self._held and self._loaded:
            self._release_all()
            # The allocator would keep a block, and the next one, in pieces that fit nothing.
            give_back_memory()
        # Normal tensors also inside of a forward in inference mode: gradients may be taken through them later.
        with torch.inference_mode(False), torch.no_grad():
            self._assign(layer)
        self._loaded.add(layer)

    @contextmanager
    def held(self, without: Collection[str] = ()) -> Iterator[None]:
        """While the context is open, all blocks have their weights, but for those of the canonical names `without`."""
        self._release_all()  # a block that has its weights has all of them
        self._held, self._without = True, frozenset(without)
        try:
            for layer in range(len(self._blocks)):
                self.load(layer)
            yield
        finally:
            self._held, self._without = False, frozenset()
            self._release_all()

    def _assign(self, layer: int) -> None:
        prefix = self._architecture.layer_path(layer, "")
        names = {name: name.removeprefix(prefix) for name in self._sources[layer]}
        empty = {self._stored(names[name]) for name in self._without & names.keys()}
        named = {names[name]: self._sources[layer][name][name] for name in names if name not in self._without}
        for packed, _ in self._architecture.packed:
            rows = split_rows(self._architecture, self._dimensions, packed)
            for leaf in ("weight", "bias"):
                if all(f"{part}.{leaf}" in named for part, _, _ in rows):
                    named[f"{packed}.{leaf}"] = torch.cat([named.pop(f"{part}.{leaf}") for part, _, _ in rows])
        block = self._blocks[layer]
        try:
            found = block.load_state_dict(named, strict=False, assign=True)
        except RuntimeError as error:
            raise InvalidInputError(f"weights do not fit config.json: {' '.join(str(error).split())}") from error
        wrong = [*(name for name in found.missing_keys if name not in empty), *found.unexpected_keys]
        if wrong:
            raise InvalidInputError(
                f"{len(wrong)} weights of layer {layer} are missing or not those of a {self._architecture.name} model "
                f"of this config, the first is {prefix}{wrong[0]}"
            )
        block.requires_grad_(False)

    def _stored(self, name: str) -> str:
        """The parameter of the torch model that the weight `name` of a block is in."""
        path, _, leaf = name.rpartition(".")
        return f"{self._architecture.packed_into(path) or path}.{leaf}"

    def _release_all(self) -> None:
        for layer in tuple(self._loaded):
            self._release(layer)

    def _release(self, layer: int) -> None:
        if layer in self._loaded:
            self._loaded.discard(layer)
            for module, name, empty in self._empty[layer]:
                module._parameters[name] = empty

    def _hook(self, layer: int) -> Callable[[Module, Any], None]:
        def before(block: Module, _inputs: Any) -> None:
            # A block whose forward somebody has replaced computes nothing.
            if "forward" not in vars(block):
                self.load(layer)

        return before


def stream(model: Module, architecture: Architecture, dimensions: Dimensions, scratch: Scratch) -> StreamedBlocks:
    """Let the blocks of `model`, whose parameters are on the meta device, get their weights when they run."""
    blocks = list(model.get_submodule(architecture.layers).children())
    return _STREAMED.setdefault(model, StreamedBlocks(blocks, architecture, dimensions, scratch))


def streamed(model: Module) -> StreamedBlocks | None:
    """The blocks of a model that was given to `stream`; None for one that holds its weights."""
    return _STREAMED.get(model)


@contextmanager
def held(model: Module, without: Collection[str] = ()) -> Iterator[None]:
    """While the context is open, `model` has the weights of all of its blocks.

    Args:
        model: of which nothing changes where it was not given to `stream`.
        without: canonical names of weights that are not read; where blocks are streamed, they have none meanwhile.
    """
    blocks = streamed(model)
    if blocks is None:
        yield
        return
    with blocks.held(without):
        yield


def load_block(model: Module, layer: int) -> None:
    """Make sure that block `layer` of `model` has its weights before its modules are looked at."""
    blocks = streamed(model)
    if blocks is not None:
        blocks.load(layer)


def _parameters(block: Module) -> list[tuple[Module, str, Parameter]]:
    return [
        (module, name, parameter)
        for module in block.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
