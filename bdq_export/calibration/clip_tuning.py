"""Clips of activations and of the KV cache, found site by site while the blocks before are already quantized."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bdq_export import parallel
from bdq_export.calibration.activation_clips import row_energies, search_clip
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.dynamic import MutableQuantization
from bdq_export.calibration.learned_clips import LearnedClips
from bdq_export.calibration.sites import Site
from bdq_export.calibration.static_cache import STATIC_TOKENS, observe_heads
from bdq_export.resume.record import Record
from bdq_export.transform import flatness
from bdq_models import Architecture
from bdq_runtime.specs import ActivationQuantization, KVQuantization, StaticKVQuantization

_SEARCH_TOKENS = 2048
_FLATNESS_TOKENS = 512
KV_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)


@dataclass(frozen=True, eq=False)
class ClipTuning:
    """Quantizes the inputs of one site after the other, and the cache of each layer.

    Attributes:
        architecture: the family.
        quantization: of the model that `runner` runs; gets what is found.
        activation_bits: None leaves activations float.
        kv: bits of the cache, and whether heads are rotated; None leaves it float.
        activation_clip: of every site, and the cache is not clipped; None searches both.
        static_kv: bits of a cache whose channels get static scales; None where there is none.
        learned: clips that are not searched because a learned stage found them.
        flatness: module of each site that was prepared -> flatness of its inputs before they are quantized.
    """

    architecture: Architecture
    quantization: MutableQuantization
    activation_bits: int | None
    kv: KVQuantization | None
    activation_clip: float | None = None
    static_kv: int | None = None
    learned: LearnedClips = field(default_factory=LearnedClips)
    flatness: dict[str, float] = field(default_factory=dict)

    def prepare(self, runner: BlockRunner, site: Site, hidden: Tensor, weights: Mapping[str, Tensor]) -> None:
        """Quantize the inputs of `site`, and the cache before the site that reads what attention gives.

        Args:
            runner: of the model with everything before the site quantized.
            site: its own weights are still float.
            hidden: inputs of its block, all calibration tokens.
            weights: canonical float weights.
        """
        few = hidden[: parallel.share(_SEARCH_TOKENS // hidden.shape[1])]
        weight = torch.cat([weights[f"{path}.weight"] for path in site.paths])
        if self.kv is not None and self._reads_attention(site):
            self.quantization.kv[site.layer] = self._tuned_cache(self.kv, runner, site, few, weight)
        if self.static_kv is not None and self._reads_attention(site):
            self.quantization.kv[site.layer] = self._static_cache(self.static_kv, runner, site.layer, hidden)
        if self.activation_bits is not None:
            inputs = _inputs(runner, site, few)
            self.flatness[site.module] = flatness(inputs[:_FLATNESS_TOKENS]) if bool(inputs.any()) else 0.0
            if site.paths[0] in self.learned.activations:
                found = self.learned.activations[site.paths[0]]
            elif self.activation_clip is None:
                found = search_clip(inputs, weight, self.activation_bits)
            else:
                found = ActivationQuantization(self.activation_bits, self.activation_clip)
            self.quantization.activations.update(dict.fromkeys(site.paths, found))

    def state_of(self, layer: int) -> Record:
        """What was found for a block, for `resume.BlockJournal`."""
        start = self.architecture.layer_path(layer, "")
        cache = self.quantization.kv.get(layer)
        return Record(
            {
                "activations": {
                    path: [found.bits, found.clip]
                    for path, found in self.quantization.activations.items()
                    if path.startswith(start)
                },
                "kv": [cache.key_clip, cache.value_clip] if isinstance(cache, KVQuantization) else None,
                "flatness": {path: value for path, value in self.flatness.items() if path.startswith(start)},
            },
            _scales(cache) if isinstance(cache, StaticKVQuantization) else {},
        )

    def restore(self, layer: int, record: Record) -> None:
        """Quantize a block as `state_of` recorded it."""
        activations = {path: ActivationQuantization(*found) for path, found in record.values["activations"].items()}
        clips = record.values["kv"]
        self.flatness.update(record.values["flatness"])
        self.quantization.activations.update(activations)
        if self.kv is not None and clips is not None:
            self.quantization.kv[layer] = replace(self.kv, key_clip=clips[0], value_clip=clips[1])
        if self.static_kv is not None:
            scales = (record.tensors[name].numpy() for name in ("key_scales", "value_scales"))
            self.quantization.kv[layer] = StaticKVQuantization(self.static_kv, *scales)

    def _reads_attention(self, site: Site) -> bool:
        readers = self.architecture.edge("value").consumers
        return any(self.architecture.layer_path(site.layer, path) in site.paths for path in readers)

    def _static_cache(self, bits: int, runner: BlockRunner, layer: int, hidden: Tensor) -> StaticKVQuantization:
        self.quantization.kv.pop(layer, None)
        heads, _ = observe_heads(runner, layer, hidden[: parallel.share(STATIC_TOKENS // hidden.shape[1])])
        return heads.quantization(bits, search=self.activation_clip is None)

    def _tuned_cache(
        self, spec: KVQuantization, runner: BlockRunner, site: Site, hidden: Tensor, weight: Tensor
    ) -> KVQuantization:
        if site.layer in self.learned.kv:
            return self.learned.kv[site.layer]
        if self.activation_clip is not None:
            return spec
        self.quantization.kv.pop(site.layer, None)
        expected = _inputs(runner, site, hidden)
        total = row_energies(expected, weight).clamp_min(1e-12)

        def error(candidate: KVQuantization) -> float:
            self.quantization.kv[site.layer] = candidate
            gap = _inputs(runner, site, hidden) - expected
            return parallel.mean_of(row_energies(gap, weight) / total)

        for candidates in (_key_clips, _value_clips):
            spec = min(candidates(spec), key=error)
        return spec


def _key_clips(spec: KVQuantization) -> Iterator[KVQuantization]:
    return (replace(spec, key_clip=ratio) for ratio in KV_RATIOS)


def _value_clips(spec: KVQuantization) -> Iterator[KVQuantization]:
    return (replace(spec, value_clip=ratio) for ratio in KV_RATIOS)


def _scales(cache: StaticKVQuantization) -> dict[str, Tensor]:
    return {"key_scales": torch.from_numpy(cache.key_scales), "value_scales": torch.from_numpy(cache.value_scales)}


def _inputs(runner: BlockRunner, site: Site, hidden: Tensor) -> Tensor:
    """Inputs `[tokens, K]` of `site` as its linears get them now."""
    rows: list[Tensor] = []

    def keep(_path: str, inputs: Tensor) -> None:
        rows.append(inputs.reshape(-1, inputs.shape[-1]).float())

    runner.run(site.layer, hidden, keep, (site.module,), stop=True)
    return torch.cat(rows)
