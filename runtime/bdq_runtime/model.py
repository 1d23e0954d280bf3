"""A decoder and its KV cache: feed tokens, get logits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from bdq_runtime.cache import Cache, CacheTensor, ConcatenatedCache, SharedCache, accepts_shared_cache, aligned
from bdq_runtime.folder import ModelFolder
from bdq_runtime.huge_pages import use_huge_pages
from bdq_runtime.session import create_session, numpy_type
from bdq_runtime.token_inputs import KEEP, NAMES, TokenInputs

Array = npt.NDArray[Any]

_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_STEPS_BEFORE_HUGE_PAGES = 8
"""A text that is not longer does not earn back the time it takes to move the weights."""


class LanguageModel:
    """A decoder with its cache, batch 1.

    `append` feeds tokens and returns logits; `length` tokens are in the cache; `truncate` forgets the last ones.

    Attributes:
        session: the ONNX Runtime session.
        folder: where the model lies.
        vocab_size: columns of the logits.
        context_length: the most positions the model was made for, None where nothing says it.
        shares_cache: True when the cache is written in place.
        length: tokens in the cache.
        branches: whether `branch` works; None until `bdq_runtime.branches.accepts_branches` has tried it.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        providers: Sequence[str] | None = None,
        share_cache: bool | None = None,
        use_library: bool | None = None,
    ) -> None:
        """Open `path` (an `.onnx` file or a folder with `model.onnx`).

        Args:
            threads: threads inside one operator; None lets ONNX Runtime choose.
            providers: execution providers in order of preference; None takes the CPU.
            share_cache: None writes the cache in place where the graph can; False never does.
            use_library: whether `bdq` operators run on the op library (see `create_session`).

        Raises:
            FileNotFoundError: no such model, or its data file is missing.
            ValueError: not a decoder with a KV cache, or a file ONNX Runtime cannot open.
            LibraryError: `use_library=True` and the library is missing or too old.
        """
        self.folder = ModelFolder.of(path)
        self.session = create_session(self.folder.model, threads, providers, use_library)
        self._inputs = {node.name: node for node in self.session.get_inputs()}
        self._outputs = {node.name: node for node in self.session.get_outputs()}
        # An initializer that may be overridden: absent, it means "the last position".
        self._keeps = KEEP in {node.name for node in self.session.get_overridable_initializers()}
        tensors = _cache_tensors(self.folder, self._inputs, self._outputs)
        self.vocab_size = _vocab_size(self.folder, self._outputs["logits"].shape[-1])
        self.context_length = self.folder.context_length()
        self._io = self.session.io_binding()
        self._tokens = TokenInputs(self._io, self._inputs, self._keeps)
        dtype = numpy_type(self._outputs["logits"].type)
        self._row = self._logits = aligned((1, 1, self.vocab_size), dtype)
        self._bound_logits: Array | None = None
        shared = share_cache is not False and accepts_shared_cache(self.session, tensors, self._tokens.one_token())
        self.shares_cache = shared
        self._cache: Cache = (SharedCache if shared else ConcatenatedCache)(self._io, tensors)
        self._steps = 0
        self._mover: Thread | None = None
        self.length = 0
        self.branches: bool | None = None
        self.reset()

    def reset(self, capacity: int = 0) -> None:
        """Forget every token; make room for `capacity` of them at once."""
        self._cache.reset(capacity)
        self.length = 0

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens.

        Raises:
            ValueError: the cache holds fewer.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot keep {length} tokens of {self.length}")
        if length < self.length:
            self._cache.truncate(length)
        self.length = length

    def append(self, tokens: Sequence[int] | Array, all_logits: bool = False, last: int = 1) -> Array:
        """Feed `tokens` after those in the cache.

        Args:
            last: how many of the last tokens' logits are wanted, at most all of them.

        Returns:
            `[last, vocab]` logits, or `[len(tokens), vocab]` with `all_logits`: the last row predicts the token after
            the last of `tokens`. The memory is reused by the next call.

        Raises:
            ValueError: no tokens, an id outside the vocabulary, or more logits asked for than tokens.
        """
        ids = self._checked(tokens)
        if not 1 <= last <= ids.shape[1]:
            raise ValueError(f"logits of the last {last} of {ids.shape[1]} tokens are asked for")
        total = self.length + ids.shape[1]
        wanted = ids.shape[1] if all_logits else last
        self._cache.bind(self.length, total)
        self._tokens.bind(ids, self.length, total, 0 if all_logits else last)
        # A graph without `logits_to_keep` computes the logits of every position.
        rows = self._run(wanted if self._keeps else ids.shape[1])
        if ids is self._tokens.token:
            self._count_step()
        self._cache.collect(total)
        self.length = total
        return rows[len(rows) - wanted :]

    def branch(self, rows: Array) -> Array:
        """Continue the tokens in the cache in several ways at once; the cache stays as it is.

        Ask `bdq_runtime.branches.accepts_branches` first: GroupQueryAttention takes one row after a past.

        Args:
            rows: token ids `[rows, count]`.

        Returns:
            `[rows, count, vocab]` logits: `[r, i]` predicts the token after `rows[r, i]`.

        Raises:
            ValueError: no tokens, or an id outside the vocabulary.
        """
        ids = self._checked(rows.ravel()).reshape(rows.shape)
        feed = {**self._tokens.values(ids, self.length), **self._cache.copies(self.length, len(rows))}
        logits: Array = self.session.run(["logits"], feed)[0]
        return logits

    def settle(self) -> None:
        """Wait until nothing runs in the background any more; for benchmarks."""
        if self._mover is not None:
            self._mover.join()

    def _count_step(self) -> None:
        """Once a text is more than a few tokens, move the weights to huge pages beside it."""
        self._steps += 1
        if self._steps == _STEPS_BEFORE_HUGE_PAGES and self.session.get_providers()[0] == "CPUExecutionProvider":
            self._mover = Thread(target=use_huge_pages, name="huge pages", daemon=True)
            self._mover.start()

    def _run(self, rows: int) -> Array:
        """Run what is bound; `[rows, vocab]` logits."""
        logits: Array
        if rows != 1 and self._outputs["logits"].shape[1] == 1:
            # Declared is the length by default. ONNX Runtime refuses a buffer of another length, but allocates one.
            self._logits = self._row
            self._io.bind_output("logits", "cpu")
            self._bound_logits = None
            self.session.run_with_iobinding(self._io)
            logits = self._io.get_outputs()[-1].numpy()  # bound after those of the cache
        else:
            logits = self._logits_buffer(rows)
            if logits is not self._bound_logits:
                self._io.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
                self._bound_logits = logits
            self.session.run_with_iobinding(self._io)
        found: Array = logits[0]
        return found

    def _checked(self, tokens: Sequence[int] | Array) -> Array:
        if len(tokens) == 0:
            raise ValueError("no tokens to feed, expected at least one")
        if len(tokens) == 1:  # the decode step: nothing is allocated
            least = most = int(tokens[0])
        else:
            ids = np.ascontiguousarray(tokens, np.int64).reshape(1, -1)
            least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= self.vocab_size:
            wrong = least if least < 0 else most
            raise ValueError(f"token {wrong} is not one of the model's {self.vocab_size}; is the tokenizer another's?")
        if len(tokens) == 1:
            self._tokens.token[0, 0] = least
            return self._tokens.token
        return ids

    def _logits_buffer(self, rows: int) -> Array:
        if rows == 1:
            return self._row
        if self._logits.shape[1] != rows:
            self._logits = self._row
            self._bound_logits = None  # the old one is freed before the new one is allocated
            self._logits = aligned((1, rows, self.vocab_size), self._row.dtype)
        return self._logits


def _cache_tensors(
    folder: ModelFolder, inputs: Mapping[str, Any], outputs: Mapping[str, Any]
) -> tuple[CacheTensor, ...]:
    """The cache of a graph, in the order of its layers.

    Raises:
        ValueError: the graph is no decoder with a cache, or wants inputs this loop does not know.
    """
    matches = [match for match in map(_PAST.fullmatch, inputs) if match]
    pairs = {m[0]: f"present.{m[1]}.{m[2]}" for m in sorted(matches, key=lambda m: (int(m[1]), m[2]))}
    missing = [name for name in ("input_ids", *([] if pairs else ["past_key_values.0.key"])) if name not in inputs]
    missing += [name for name in ("logits", *pairs.values()) if name not in outputs]
    if missing:
        raise ValueError(f"{folder.model} is not a decoder with a KV cache: it has no {', '.join(missing[:3])}")
    unknown = [name for name in inputs if name not in pairs and name not in NAMES]
    if unknown:
        raise ValueError(f"{folder.model} wants the input {unknown[0]}; known are {', '.join(NAMES)} and the KV cache")
    return tuple(_cache_tensor(folder, inputs[past], present) for past, present in pairs.items())


def _cache_tensor(folder: ModelFolder, past: Any, present: str) -> CacheTensor:
    _, heads, _, channels = past.shape if len(past.shape) == 4 else (None,) * 4
    if isinstance(channels, str):  # a symbolic dimension, as onnxruntime-genai writes it
        channels = folder.head_size()
    if not isinstance(heads, int) or not isinstance(channels, int):
        raise ValueError(
            f"{past.name} of {folder.model} has shape {past.shape}, expected [batch, heads, positions, channels] with "
            "heads and channels fixed (or head_dim in config.json beside it)"
        )
    return CacheTensor(past.name, present, heads, channels, numpy_type(past.type))


def _vocab_size(folder: ModelFolder, dimension: int | str | None) -> int:
    size = dimension if isinstance(dimension, int) else folder.genai.get("vocab_size", folder.config.get("vocab_size"))
    if not isinstance(size, int):
        raise ValueError(f"logits of {folder.model} have {dimension!r} columns, and no config.json beside it says more")
    return size
