"""Blocks that are quantized: one record each, with what else was decided on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from bdq_export.quantize.sequential import SequentialResult
from bdq_export.resume.codecs import quantized_from, quantized_record
from bdq_export.resume.record import Record, merged
from bdq_export.resume.store import ProgressStore


class BlockPart(Protocol):
    """Something that decides for each block and is asked for nothing where the block is restored."""

    def state_of(self, layer: int) -> Record:
        """What it decided for a block that has just been quantized."""

    def restore(self, layer: int, record: Record) -> None:
        """Be as after that block.

        Raises:
            ValueError, KeyError, TypeError: the record is another one.
        """


class BlockJournal:
    """The `Journal` of one run of `quantize_blocks`.

    Args:
        store: keeps the records.
        name: of the run, different for each one in a calibration.
        parts: by name.
    """

    def __init__(self, store: ProgressStore, name: str, parts: Mapping[str, BlockPart]) -> None:
        self._store, self._name, self._parts = store, name.replace(" ", "-"), parts

    def restored(self, layer: int) -> SequentialResult | None:
        """What quantizing block `layer` gave, with all parts as they were after it; None where it is to be done."""

        def decode(record: Record) -> SequentialResult:
            done = record.part("done")
            result = SequentialResult(quantized_from(done), done.values["fallbacks"], done.values["flatness"])
            for name, part in self._parts.items():
                part.restore(layer, record.part(name))
            return result

        return self._store.load(self._file(layer), decode)

    def finished(self, layer: int, done: SequentialResult) -> None:
        """Keep what quantizing block `layer` gave."""
        weights = quantized_record(done.quantized)
        values = {**weights.values, "fallbacks": done.fallbacks, "flatness": done.flatness}
        parts = {name: part.state_of(layer) for name, part in self._parts.items()}
        self._store.save(self._file(layer), merged({"done": Record(values, weights.tensors), **parts}))

    def _file(self, layer: int) -> str:
        return f"{self._name}-block-{layer:04d}"
