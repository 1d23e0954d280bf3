"""Diagonals multiply outputs of linears; what gradients at those outputs are like follows from that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bdq_export.calibration import precision
from bdq_export.calibration.blocks import BlockRunner
from bdq_export.calibration.output_curvature import output_curvature
from bdq_export.calibration.output_gradients import label_seeds
from bdq_export.float_model import load_float_model
from bdq_export.progress import QuietProgress
from bdq_export.quantize import gptq
from bdq_export.transform import fold
from bdq_export.transform.output_scales import output_scales

TOKENS = torch.randint(0, 320, (6, 40), generator=torch.Generator().manual_seed(1))
BETWEEN_LINEARS = ("value", "key_query", "mlp_middle")
SCALED = {"k_proj", "q_proj", "v_proj", "up_proj"}


def scales_of(tiny, old, new):
    found = {}
    for layer in range(tiny.dimensions.layers):
        found |= output_scales(tiny.architecture, tiny.dimensions, layer, old, new)
    return found


@pytest.mark.parametrize(("family", "scaled"), [("llama", SCALED), ("qwen3", {"v_proj", "up_proj"}), ("phi3", SCALED)])
def test_rows_are_multiplied_as_it_says(family, scaled, tiny_model, random_transforms):
    tiny = tiny_model(family)
    old, new = (random_transforms(tiny, seed, rotations=False, edges=BETWEEN_LINEARS) for seed in (1, 2))
    found = scales_of(tiny, old, new)
    # Keys and queries behind norms have their diagonal in the gains.
    assert {path.rsplit(".", 1)[1] for path in found} == scaled
    one, other = (fold(tiny.architecture, tiny.dimensions, tiny.weights, each) for each in (old, new))
    for path, scale in found.items():
        rows = one[f"{path}.weight"] * scale[:, None]
        torch.testing.assert_close(rows.float(), other[f"{path}.weight"].float(), rtol=1e-4, atol=1e-7)


def test_equal_diagonals_scale_nothing(tiny_model, random_transforms):
    tiny = tiny_model("llama")
    both = random_transforms(tiny, 1)
    assert scales_of(tiny, both, both) == {}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_curvature_carried_over_diagonals_is_the_one_measured_behind_them(
    family, tiny_model, random_transforms, monkeypatch
):
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: False)
    # Damping is no curvature: it is a share of the mean, which diagonals move.
    monkeypatch.setattr(gptq, "_OUTPUT_DAMPING", 1e-9)
    monkeypatch.setattr(gptq, "_CHANCE_DAMPING", 0.0)
    tiny = tiny_model(family)
    transforms = [random_transforms(tiny, seed, rotations=False, edges=BETWEEN_LINEARS) for seed in (1, 2)]
    seeds, measured = label_seeds(5, len(TOKENS)), []
    for each in transforms:
        model = load_float_model(tiny, fold(tiny.architecture, tiny.dimensions, tiny.weights, each))
        runner = BlockRunner(model, tiny.architecture.layers, TOKENS)
        measured.append(output_curvature(runner, tiny.architecture, tiny.dimensions, {}, seeds, QuietProgress()))
    scales = scales_of(tiny, *transforms)
    wrong = 0
    moved = replace(measured[0], output_scales=scales)
    for path in moved.measured:
        (carried,), (expected,) = moved.factors(path), measured[1].factors(path)
        tolerance = 3e-3 * float(expected.abs().max())
        torch.testing.assert_close(carried, expected, rtol=0, atol=tolerance)
        (unscaled,) = measured[0].factors(path)
        wrong += not torch.allclose(unscaled, expected, rtol=0, atol=tolerance)
    assert wrong > len(scales) // 2, "the diagonals hardly matter, and nor does this test"
