"""Quantized tiny models, as calibration leaves them, for the learned stage."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bdq_export.learning.parameters import all_sites
from bdq_export.learning.state import QuantizedModel
from bdq_export.quantize.rtn import rtn
from bdq_runtime.packing import ODD, PerBlock, PerChannel, QuantSpec
from bdq_runtime.specs import ActivationQuantization, KVQuantization, OnlineTransform

SPECS = (QuantSpec(4, PerChannel(), grid=ODD), QuantSpec(4, PerChannel()), QuantSpec(4, PerBlock(16)))


@pytest.fixture
def in_float32(monkeypatch) -> None:
    """Products without bfloat16's rounding, so that results can be compared closely."""
    monkeypatch.setattr("bdq_export.learning.student.product_dtype", lambda: torch.float32)


@pytest.fixture
def quantized_state() -> Callable[..., QuantizedModel]:
    """`quantized_state(tiny, bits=8, online=True)`: weights of 4 bits, clips and diagonals by site."""

    def make(tiny, bits: int | None = 8, online: bool = True, seed: int = 0) -> QuantizedModel:
        rng = np.random.default_rng(seed)
        quantized, activations, transforms = {}, {}, {}
        for index, site in enumerate(all_sites(tiny.architecture, tiny.dimensions)):
            spec = SPECS[index % len(SPECS)]
            channels = tiny.weights[f"{site.paths[0]}.weight"].shape[1]
            diagonal = np.exp(0.3 * rng.normal(size=channels)).astype(np.float32)
            transform = OnlineTransform(channels & -channels, diagonal, interleave=1 + index % 2)
            clip = float(rng.uniform(0.6, 0.95))
            for path in site.paths:
                quantized[f"{path}.weight"] = rtn(tiny.weights[f"{path}.weight"], spec)
                if bits is not None:
                    activations[path] = ActivationQuantization(bits, clip)
                if online:
                    transforms[path] = transform
        power = tiny.dimensions.head_dim & (tiny.dimensions.head_dim - 1) == 0
        kv = {}
        if bits is not None:
            activations[tiny.architecture.lm_head] = ActivationQuantization(8)
            cache = KVQuantization(bits, bits, 0.9, 0.95, hadamard=power and online)
            kv = dict.fromkeys(range(tiny.dimensions.layers), cache)
        return QuantizedModel(tiny.weights, quantized, activations, transforms, kv)

    return make
