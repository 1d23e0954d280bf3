"""One calibration by several processes, each with its share of the calibration sequences.

    torchrun --nproc-per-node 2 -m bdq_export export MODEL_DIR OUT ...

torchrun describes the processes in environment variables; without them (or with one process) everything here does
nothing. All processes run the same code and call these functions in the same order. What they decide by is reduced or
sent by the first one, so all decide the same. The first process alone shows, prints and writes.

The only module that knows torch.distributed. Tensors of the CPU are reduced with gloo, those of a GPU with nccl.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from bdq_export.errors import BdqError, PeerFailedError, UsageError, exit_code_of

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

_LONGEST_WAIT = timedelta(hours=12)
"""For a process that still runs: the first one may sample text or write files that long. One that ends is noticed at
once, because its connections close."""
_LAST_WORDS = 10.0
"""Seconds that a process which failed waits for the others to hear of it."""


@dataclass(frozen=True)
class _Group:
    rank: int
    size: int
    store: Any


_ALONE = _Group(0, 1, None)
_group = _ALONE


def size() -> int:
    """Number of processes."""
    return _group.size


def local_size() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", _group.size)) if _group.size > 1 else 1


def is_first() -> bool:
    """Whether this process shows, prints and writes; true before the group begins in the one that will."""
    return _group.rank == 0 if _group is not _ALONE else int(os.environ.get("RANK", "0")) == 0 or not _described()


def rank() -> int:
    """Which of them this is, from 0."""
    return _group.rank


def share(count: int) -> int:
    """How many of `count` sequences are this process's, of what `shard` gave it; at least one."""
    return max(1, count // _group.size)


def shard(rows: Tensor) -> Tensor:
    """Every `size`-th of `rows` `[samples, ...]`, beginning at the rank; may be none."""
    return rows[_group.rank :: _group.size]


def own(index: Tensor) -> Tensor:
    """Places in this process's `shard` of those rows that it has, of `index` `[count]` into all rows."""
    return index[index % _group.size == _group.rank] // _group.size


def unshard(rows: Tensor) -> Tensor:
    """Inverse of `shard`: `[samples, ...]` on all processes."""
    if _group.size == 1:
        return rows
    import torch
    import torch.distributed as dist

    counts = torch.zeros(_group.size, dtype=torch.int64)
    counts[_group.rank] = len(rows)
    add_up(counts)
    longest = int(counts.max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(_group.size)]
    with _together():
        dist.all_gather(parts, padded)
    together = torch.stack(parts, 1).flatten(0, 1)
    return together[: int(counts.sum())]


def add_up(*tensors: Tensor) -> None:
    """Replace each of `tensors` by its sum over all processes."""
    _reduce("SUM", tensors)


def largest(*tensors: Tensor) -> None:
    """Replace each of `tensors` by its elementwise maximum over all processes."""
    _reduce("MAX", tensors)


def average_gradients(parameters: Iterable[Parameter], samples: int) -> None:
    """Replace gradients of means over `samples` of this process by those of the mean over all; none counts as zero."""
    if _group.size == 1:
        return
    import torch

    count = total(samples)[0]
    every = list(parameters)
    found = [torch.zeros_like(each) if each.grad is None else each.grad * (samples / count) for each in every]
    flat = torch.cat([gradient.flatten() for gradient in found])
    add_up(flat)
    for each, part in zip(every, torch.split(flat, [each.numel() for each in every]), strict=True):
        each.grad = part.view_as(each).clone()


def total(*values: float) -> list[float]:
    """The sum of each value over all processes, in float64."""
    if _group.size == 1:
        return list(values)
    import torch

    sums = torch.tensor(values, dtype=torch.float64)
    add_up(sums)
    found: list[float] = sums.tolist()
    return found


def mean(sum_: float, count: float) -> float:
    """The mean of what all processes have together, from its sum and number on each."""
    together, number = total(sum_, count)
    return together / number


def mean_of(values: Tensor) -> float:
    """The mean of the elements that all processes have together."""
    import torch

    if _group.size == 1:
        return float(values.mean(dtype=torch.float64))
    return mean(float(values.sum(dtype=torch.float64)), values.numel())


def from_first(data: bytes | None) -> bytes | None:
    """What the first process gives; the others' own is not looked at."""
    if _group.size == 1:
        return data
    import torch
    import torch.distributed as dist

    length = torch.tensor([-1 if data is None or _group.rank else len(data)])
    with _together():
        dist.broadcast(length, 0)
        if int(length) < 0:
            return None
        content = torch.empty(int(length), dtype=torch.uint8)
        if _group.rank == 0 and data:
            content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        dist.broadcast(content, 0)
    return content.numpy().tobytes()


def tokens_from_first(tokens: Tensor | None) -> Tensor:
    """Token ids `[samples, seq_len]` int64 of the first process; the others give None."""
    if _group.size == 1:
        assert tokens is not None, "the first process has them"
        return tokens
    import torch

    data = from_first(None if tokens is None else tokens.shape[1].to_bytes(8, "little") + tokens.numpy().tobytes())
    assert data is not None, "the first process has them"
    return torch.frombuffer(bytearray(data[8:]), dtype=torch.int64).reshape(-1, int.from_bytes(data[:8], "little"))


def wait() -> None:
    """Go on when all processes are here."""
    if _group.size > 1:
        total(0.0)


def refuse_several(command: str) -> None:
    """Refuse to run `command` in each of several processes.

    All of them say so: they have not met, and torchrun ends the others as soon as one has ended.

    Raises:
        UsageError: torchrun started more than one.
    """
    if _described():
        raise UsageError(
            f"{command} is for one process, but torchrun started {os.environ['WORLD_SIZE']}; start it without torchrun"
        )


@contextmanager
def data_parallel() -> Iterator[None]:
    """Be one of the processes that torchrun describes while the block runs; they also end together.

    Raises:
        PeerFailedError: another process failed first; that one says why.
    """
    global _group
    if not _described() or _group is not _ALONE:
        yield
        return
    # The stack of every connection that closes says nothing to whoever reads the error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch
    import torch.distributed as dist

    # Its functions have the process group as a default argument. Imported later, as transformers does, they would keep
    # the group and its threads to the end of the process, where a thread that still frees a tensor aborts it.
    import torch.distributed.nn

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _together():
        dist.init_process_group(backend, timeout=_LONGEST_WAIT)
    store = dist.distributed_c10d._get_default_store()
    _group = _Group(dist.get_rank(), dist.get_world_size(), store)
    try:
        yield
        wait()  # for what the first one writes
    except BaseException as error:
        _end_together(error)
        raise
    finally:
        _group = _ALONE
        _close()


def _end_together(error: BaseException) -> None:
    """Let all processes end with the exit code of the first failure.

    The one that fails says so in the store, which all share, and closes its connections: whoever waits for it gets an
    error from torch.distributed, and finds the reason in the store.
    """
    code, rank, store = exit_code_of(error), _group.rank, _group.store
    if threading.current_thread() is threading.main_thread():
        # torchrun ends the others as soon as one has ended: too early for the one that has yet to say why.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        claim = store.compare_set("bdq/failed", "", f"{rank} {code}").decode()
        if claim != f"{rank} {code}":
            store.set(f"bdq/heard/{rank}", "")
    except RuntimeError:
        return  # the process that held the store is gone without a word
    if claim != f"{rank} {code}":
        raise PeerFailedError(int(claim.split()[1])) from error
    _close()
    # The store may be in this process: the others must have read it.
    others = [f"bdq/heard/{other}" for other in range(_group.size) if other != rank]
    end = time.monotonic() + _LAST_WORDS
    with suppress(RuntimeError):
        while not store.check(others) and time.monotonic() < end:
            time.sleep(0.05)


def _close() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()


@contextmanager
def _together() -> Iterator[None]:
    """Whoever waits in vain for another process gets an error of this project."""
    try:
        yield
    except RuntimeError as error:
        raise BdqError(
            f"another process ended without a word ({' '.join(str(error).split())[:160]}); see what it printed, and "
            "whether the system ended it for want of memory"
        ) from error


def _described() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and "MASTER_ADDR" in os.environ


def _reduce(operation: str, tensors: tuple[Tensor, ...]) -> None:
    if _group.size == 1:
        return
    import torch.distributed as dist

    with _together():
        for tensor in tensors:
            dist.all_reduce(tensor, getattr(dist.ReduceOp, operation))
