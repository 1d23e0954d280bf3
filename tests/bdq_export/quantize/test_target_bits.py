"""Which average bits a model can have."""

from __future__ import annotations

import pytest

from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions
from bdq_export.quantize.target_bits import bit_budget, bit_choices, check_target, least_scheme


def budget_of(tiny, **options):
    return bit_budget(ExportOptions(**options), tiny.architecture, tiny.dimensions)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_every_linear_is_in_one_group_or_kept(family, tiny_model):
    tiny = tiny_model(family)
    budget = budget_of(tiny, keep=("*.layers.1.*=8", "*.down_proj=16"))
    paths = [path for group in budget.groups for path in group.paths]
    every = [tiny.architecture.layer_path(layer, path) for layer in range(3) for path in tiny.architecture.linears]
    assert sorted([*paths, *budget.kept]) == sorted(every)
    assert budget.total == sum(tiny.weights[f"{path}.weight"].numel() for path in every)
    assert sum(group.weights for group in budget.groups) == sum(
        tiny.weights[f"{path}.weight"].numel() for path in paths
    )
    kept = sum(tiny.weights[f"{path}.weight"].numel() * bits for path, bits in budget.kept.items())
    assert budget.kept_bits == kept
    assert budget.kept["model.layers.1.self_attn.q_proj"] == 8
    assert budget.kept["model.layers.1.mlp.down_proj"] == 16


def test_what_shares_an_input_is_one_group(tiny_model):
    groups = budget_of(tiny_model("llama")).groups
    assert [tuple(path.rpartition(".")[2] for path in group.paths) for group in groups[:4]] == [
        ("q_proj", "k_proj", "v_proj"),
        ("o_proj",),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        ({"scheme": "w4a16"}, (2, 4, 8)),
        ({"scheme": "w4a16", "accuracy_level": 0}, (2, 4)),
        ({"scheme": "w4a16", "ops": "bdq"}, (2, 3, 4, 8)),
        ({"scheme": "w3a16"}, (2, 3, 4, 8)),
        ({"scheme": "w4a4kv4"}, (2, 3, 4, 8)),
    ],
)
def test_choices_are_the_bits_of_the_operators(options, choices):
    assert bit_choices(ExportOptions(**options)) == choices


@pytest.mark.parametrize("target", [1.9, 8.1, 0.0, float("nan"), float("inf")])
def test_a_target_no_weights_have_is_refused(target):
    with pytest.raises(UsageError, match="expected an average from 2 to 8"):
        ExportOptions(target_bits=target)


def test_float_weights_and_static_operators_have_no_bits_to_choose():
    with pytest.raises(UsageError, match="scheme w16a8 leaves them float"):
        ExportOptions(scheme="w16a8", target_bits=4.0)
    with pytest.raises(UsageError, match="static --ops qdq has weights of 8 bits only"):
        ExportOptions(scheme="w8a8", ops="qdq", target_bits=4.0)


@pytest.mark.parametrize("target", [2.0, 3.3, 8.0])
def test_a_target_in_reach_passes(target, tiny_model):
    tiny = tiny_model("llama")
    check_target(ExportOptions(target_bits=target), tiny.architecture, tiny.dimensions)


def test_a_target_out_of_reach_is_refused_in_one_line(tiny_model):
    tiny = tiny_model("llama")
    options = ExportOptions(target_bits=3.0, keep=("*.layers.0.*=8", "*.layers.1.*=16"))
    with pytest.raises(UsageError, match=r"14 linears fixed by --keep have 8\.667 to 10\.67 on average") as refused:
        check_target(options, tiny.architecture, tiny.dimensions)
    assert "\n" not in str(refused.value)
    with pytest.raises(UsageError, match="linears of 2, 4 bits have 2 to 4 on average"):
        check_target(ExportOptions(target_bits=4.5, accuracy_level=0), tiny.architecture, tiny.dimensions)
    with pytest.raises(UsageError, match="--keep fixes every linear"):
        check_target(ExportOptions(target_bits=4.0, keep=("model.layers.*=4",)), tiny.architecture, tiny.dimensions)


def test_fewer_bits_than_the_scheme_are_expected_to_agree_less():
    assert str(least_scheme(ExportOptions(scheme="w4a4kv4", target_bits=3.9))) == "w3a4kv4"
    assert str(least_scheme(ExportOptions(scheme="w2a16", target_bits=4.0))) == "w4a16"
    assert str(least_scheme(ExportOptions(scheme="w2a16"))) == "w2a16"
