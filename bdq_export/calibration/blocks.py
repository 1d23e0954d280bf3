"""Run a transformers model one decoder block at a time.

What a block is called with (masks, RoPE tables, per layer where they differ as in Gemma 3) is recorded from one cheap
run of the model with its blocks replaced by recorders. After that the hidden states of all calibration tokens are
the only thing carried from block to block, so a block may be quantized before its outputs are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.precision import fast_matmuls

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedModel

Observer = Callable[[str, Tensor], None]
"""Called with a module path and that module's input `[..., K]`."""

Through = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
"""Called with a block as a function of its input, and that input."""

_BATCH_TOKENS = 4096


class _Stop(Exception):  # noqa: N818 - not an error: ends a block's forward once everything wanted was seen
    pass


class BlockRunner:
    """The decoder blocks of a model, and the calls they get for `[batch, seq_len]` tokens.

    Args:
        model: a causal LM of transformers.
        layers: path of its list of decoder blocks.
        tokens: calibration tokens `[samples, seq_len]`.
        fast: allow bfloat16 products where the processor has them.
        batch_tokens: run together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        tokens: Tensor,
        fast: bool = True,
        batch_tokens: int = _BATCH_TOKENS,
    ) -> None:
        self.model = model
        self.layers = layers
        self.blocks: list[Module] = list(model.get_submodule(layers).children())
        # Several processes together have batches as large as one alone, in the same halves (see `statistics.shrunk`).
        self._batch = parallel.share(batch_tokens // tokens.shape[1])
        self._tokens = tokens
        self._fast = fast
        self._calls: dict[int, list[dict[str, Any]]] = {}

    def block_path(self, layer: int) -> str:
        """Path of a block in the model."""
        return f"{self.layers}.{layer}"

    @torch.inference_mode()
    def embedded(self) -> Tensor:
        """Inputs of the first block, float32 `[samples, seq_len, hidden]`."""
        return torch.cat([self._record(batch) for batch in torch.split(self._tokens, self._batch)])

    @torch.inference_mode()
    def run(
        self, layer: int, hidden: Tensor, observe: Observer | None = None, at: Sequence[str] = (), stop: bool = False
    ) -> Tensor:
        """Outputs of block `layer` for its inputs `hidden` `[samples, seq_len, hidden_size]`.

        Args:
            layer: index of the block.
            hidden: the block's inputs.
            observe: called with the input of each module of `at`, batch by batch.
            at: module paths in the model.
            stop: end each batch once the last module of `at` was observed; then the result is empty.
        """
        block = self.blocks[layer]
        outputs = []
        with self._observing(observe, at, stop), fast_matmuls(self._fast):
            for batch in torch.split(hidden, self._batch):
                try:
                    result = block(batch, **self._call(batch.shape[0], layer))
                except _Stop:
                    continue
                outputs.append((result[0] if isinstance(result, tuple) else result).float())
        return torch.cat(outputs) if outputs else hidden.new_empty(0)

    def run_with_gradients(self, layer: int, hidden: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Batch by batch: the block's input as a leaf of a new graph, its output, and that batch of each of `beside`.

        Args:
            layer: index of the block.
            hidden: the block's inputs `[samples, seq_len, hidden_size]`.
            beside: tensors of as many samples, such as the gradient at the outputs.
        """
        for batch, *others in zip(*(torch.split(each, self._batch) for each in (hidden, *beside)), strict=True):
            call = _normal(self._call(batch.shape[0], layer))
            with torch.enable_grad():
                leaf = batch.clone().requires_grad_()
                result = self.blocks[layer](leaf, **call)
                yield leaf, result[0] if isinstance(result, tuple) else result, *(each.clone() for each in others)

    def block(self, layer: int, hidden: Tensor) -> Tensor:
        """Outputs of block `layer` for one batch of inputs `[batch, seq_len, hidden_size]`, in float32.

        Gradients are the caller's to switch on or off.
        """
        result = self.blocks[layer](hidden, **_normal(self._call(hidden.shape[0], layer)))
        output: Tensor = result[0] if isinstance(result, tuple) else result
        return output

    def differentiable(self, tokens: Tensor, through: Through | None = None) -> Tensor:
        """Outputs of the final norm `[batch, seq_len, hidden_size]` float32 for `tokens` `[batch, seq_len]`.

        Gradients are the caller's to switch on or off.

        Args:
            tokens: as long as the runner's own.
            through: calls a block with its input, for gradient checkpointing; None calls it plainly.
        """
        hidden = self._record(tokens).clone()
        for layer in range(len(self.blocks)):
            hidden = self.block(layer, hidden) if through is None else through(partial(self.block, layer), hidden)
        norm, _ = self.ends()
        result: Tensor = norm(hidden)
        return result.float()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """Logits `[batch, seq_len, vocab]` float32 from the outputs of the last block, batch by batch."""
        norm, head = self.ends()
        for batch in torch.split(hidden, 1):
            with fast_matmuls(self._fast):
                result = head(norm(batch))
            yield result.float()

    def ends(self) -> tuple[Module, Module]:
        """The final norm and lm_head."""
        base = self.layers.rpartition(".")[0]
        return self.model.get_submodule(f"{base}.norm"), self.model.get_submodule("lm_head")

    @contextmanager
    def _observing(self, observe: Observer | None, at: Sequence[str], stop: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if observe is not None:
                for index, path in enumerate(at):
                    hook = _hook(path, observe, stop and index == len(at) - 1)
                    handle = self.model.get_submodule(path).register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
            yield

    def _call(self, batch: int, layer: int) -> dict[str, Any]:
        """Keyword arguments of block `layer` for a batch of that many sequences."""
        if batch not in self._calls:
            # They do not depend on which tokens there are, and a batch may draw one sequence twice.
            self._record(self._tokens[:1].expand(batch, -1))
        return self._calls[batch][layer]

    def _record(self, tokens: Tensor) -> Tensor:
        """Embed `tokens`; notes the keyword arguments of every block for this batch size."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def recorder(hidden_states: Tensor, **call: Any) -> Tensor:
            seen.append((hidden_states, call))
            return hidden_states

        forwards: Mapping[Module, Any] = {block: block.forward for block in self.blocks}
        try:
            for block in self.blocks:
                block.forward = recorder
            # The base model: logits are not needed.
            self.model.get_submodule(self.layers.rpartition(".")[0])(input_ids=tokens, use_cache=False)
        finally:
            for block in forwards:
                del block.forward
        if len(seen) != len(self.blocks):
            raise RuntimeError(f"{len(seen)} of {len(self.blocks)} decoder blocks were called")
        self._calls.setdefault(tokens.shape[0], [call for _, call in seen])
        return seen[0][0].float()


def _normal(value: Any) -> Any:
    """`value` with tensors of inference mode copied: autograd refuses to save those."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {key: _normal(each) for key, each in value.items()}
    return tuple(_normal(each) for each in value) if isinstance(value, tuple) else value


def _hook(path: str, observe: Observer, stop: bool) -> Callable[[Module, tuple[Any, ...]], None]:
    def hook(_module: Module, inputs: tuple[Any, ...]) -> None:
        observe(path, inputs[0])
        if stop:
            raise _Stop

    return hook
