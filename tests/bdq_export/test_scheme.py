"""Schemes and options round-trip, and whatever cannot be meant is a usage error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdq_export.calibration.learned_scales import tuning_options
from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions, parse_block_size, parse_keep
from bdq_export.scheme import QuantScheme

SCHEMES = st.builds(
    QuantScheme,
    st.sampled_from([2, 3, 4, 8, 16]),
    st.sampled_from([3, 4, 8, 16]),
    st.sampled_from([3, 4, 8, 16]),
)


@given(SCHEMES)
def test_a_scheme_round_trips_through_its_name(scheme: QuantScheme) -> None:
    assert QuantScheme.parse(str(scheme)) == scheme


@given(st.text(max_size=12))
def test_any_text_is_a_scheme_or_a_usage_error(text: str) -> None:
    try:
        scheme = QuantScheme.parse(text)
    except UsageError:
        return
    assert QuantScheme.parse(str(scheme)) == scheme


@pytest.mark.parametrize("text", ["", "w4", "w5a16", "w4a2", "w4a16kv5", "W4A16", "w4a16 ", "w4a16kv", "a4w4"])
def test_malformed_schemes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="scheme"):
        QuantScheme.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"transform": "magic"},
        {"weights": "awq"},
        {"block_size": 48},
        {"scheme": "w4a4kv4", "ops": "matmulnbits"},
        {"scheme": "w3a16", "ops": "matmulnbits"},
        {"scheme": "w16a8", "ops": "matmulnbits"},
        {"scheme": "w4a4", "block_size": 16},
        {"scheme": "w4a4", "symmetric": False},
        {"ops": "bdq", "symmetric": False},
        {"ops": "bdq", "block_size": 16},
        {"keep": ("lm_head=3",), "block_size": 16},
        {"keep": ("lm_head=3",), "ops": "matmulnbits"},
        {"kv_scales": "fixed"},
        {"kv_scales": "static"},
        {"kv_scales": "static", "scheme": "w4a4"},
        {"kv_scales": "static", "scheme": "w4a16kv3"},
        {"kv_scales": "static", "scheme": "w3a3kv3"},
        {"kv_scales": "static", "scheme": "w8a8kv8", "ops": "qdq"},
        {"ops": "qdq"},
        {"ops": "qdq", "scheme": "w8a8kv4"},
        {"ops": "qdq", "scheme": "w4a16"},
        {"accuracy_level": 5},
        {"scheme": "w8a16", "accuracy_level": 0},
        {"scheme": "w4a8", "accuracy_level": 1},
        {"keep": ("lm_head",)},
        {"keep": ("lm_head=5",)},
        {"effort": "slow"},
        {"effort": "best", "scheme": "w8a8", "ops": "qdq"},
        {"effort": "best", "scheme": "w16a4"},
        {"effort": "best", "transform": "none", "weights": "rtn"},
        {"loss": "rce"},
        {"loss": "ce", "scheme": "w4a4kv4", "effort": "fast"},
        {"loss": "mse", "scheme": "w4a4kv4"},
        {"loss_delta": 0.3, "scheme": "w4a4kv4"},
        {"loss_delta": 1.5, "loss": "rce", "scheme": "w4a4kv4"},
        {"loss_target": "label", "loss": "ce", "scheme": "w4a4kv4"},
        {"calib_samples": 0},
        {"calib_seq_len": 1},
        {"min_top1": 1.5},
        {"seed": -1},
        {"scheme": "w4a4", "effort": "fast", "activation_clip": 0.0},
        {"scheme": "w4a4", "effort": "fast", "activation_clip": 1.01},
        {"scheme": "w4a4", "effort": "fast", "activation_clip": float("nan")},
        {"scheme": "w4a4", "activation_clip": 0.9},  # it would be learned
        {"scheme": "w4a16", "activation_clip": 0.9},
        {"scheme": "w4a8", "effort": "fast", "activation_clip": 0.9},  # inside of MatMulNBits
        {"scheme": "w4a16", "transform": "diag"},
        {"scheme": "w4a8", "transform": "diag-before"},
        {"scheme": "w4a16kv4", "transform": "diag-none"},
        {"scheme": "w4a16", "transform": "spin"},
        {"scheme": "w4a16kv4", "transform": "spin"},
        {"scheme": "w4a8", "transform": "spin"},  # inside of MatMulNBits
        {"scheme": "w8a8", "ops": "qdq", "transform": "spin"},
        {"scheme": "w4a16", "transform": "kronecker"},
        {"scheme": "w4a8", "transform": "kronecker"},  # inside of MatMulNBits
        {"scheme": "w8a8", "ops": "qdq", "transform": "kronecker"},
        {"scheme": "w4a4kv4", "transform": "kronecker", "weights": "rtn"},
        {"scheme": "w4a4kv4", "transform": "kronecker", "effort": "fast", "activation_clip": 0.9},
        {"scheme": "w8a8", "ops": "qdq", "block_size": 32},
        {"scheme": "w8a8", "ops": "qlinear", "block_size": 64},
        {"scheme": "w16a4", "block_size": 64},
        {"scheme": "w8a8", "ops": "qdq", "symmetric": False},
        {"scheme": "w16a16", "symmetric": False, "keep": ("lm_head=8",)},
        {"scheme": "w4a4kv4", "accuracy_level": 0},
        {"scheme": "w4a16", "ops": "bdq", "accuracy_level": 1, "keep": ("lm_head=4",)},
        {"scheme": "w8a8", "ops": "qlinear", "accuracy_level": 0},
        {"scheme": "w16a16", "accuracy_level": 0},
        {"transform": "none", "weights": "rtn", "calib_samples": 24},
        {"transform": "none", "weights": "rtn", "calib_samples": 24, "calib": "text.txt"},
        {"transform": "none", "weights": "rtn", "calib_seq_len": 512},
        {"scheme": "w4a8", "transform": "none", "weights": "rtn", "calib_samples": 24},  # int8 inside of MatMulNBits
    ],
)
def test_options_that_cannot_be_meant_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ExportOptions(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"scheme": "w8a8", "ops": "qdq", "block_size": 0},  # one scale a row, as asked
        {"scheme": "w4a4", "block_size": 64},
        {"scheme": "w16a4", "block_size": 64, "keep": ("lm_head=8",)},
        {"symmetric": False},
        {"scheme": "w4a16kv4", "symmetric": False},
        {"scheme": "w16a16", "symmetric": False, "keep": ("lm_head=4",)},
        {"scheme": "w8a16", "symmetric": False},  # documented to have none at 8 bits
        {"accuracy_level": 0},
        {"scheme": "w3a16", "accuracy_level": 0, "keep": ("lm_head=4",)},
        {"transform": "none", "weights": "rtn", "calib_seq_len": 64, "calib": "text.txt"},
        {"transform": "none", "weights": "rtn", "calib_samples": 24, "target_bits": 4.0},
        {"scheme": "w4a4", "transform": "none", "weights": "rtn", "calib_samples": 24},
        {"scheme": "w4a16kv4", "transform": "none", "weights": "rtn", "calib_samples": 24},
        {"scheme": "w8a8", "ops": "qdq", "transform": "none", "weights": "rtn", "calib_samples": 24},
    ],
)
def test_options_that_do_something_are_taken(change: dict[str, object]) -> None:
    ExportOptions(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"scheme": "w8a8", "ops": "qdq", "block_size": 32},
            "--block-size: weights of static --ops qdq have one scale",
        ),
        ({"scheme": "w8a8", "ops": "qdq", "symmetric": False}, "--asymmetric: w8a8 by qdq has no weights with zero"),
        (
            {"scheme": "w4a4", "accuracy_level": 0},
            "--accuracy-level is of MatMulNBits, but there is none in w4a4 by bdq",
        ),
        (
            {"transform": "none", "weights": "rtn", "calib_samples": 24},
            "--calib-samples: --transform none --weights rtn calibrates nothing at w4a16; leave it out",
        ),
    ],
)
def test_one_line_says_which_option_does_nothing(change: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line) as refusal:
        ExportOptions(**change)  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"scheme": "w4a16"}, "have a scale for each token, but w4a16 by matmulnbits has none; use bdq"),
        ({"weights": "rtn"}, "learned block by block before GPTQ rounds, but --weights is rtn; leave it out"),
        ({"activation_clip": 0.9, "effort": "fast"}, "--activation-clip fixes what transform kronecker learns"),
    ],
)
def test_where_flatquant_cannot_be_one_line_says_so(change: dict[str, object], line: str) -> None:
    with pytest.raises(UsageError, match=line) as refusal:
        ExportOptions(**{"scheme": "w4a4kv4", "transform": "kronecker", **change})  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)


def test_flatquant_learns_from_as_many_sequences_at_every_effort() -> None:
    found = {effort: ExportOptions("w4a4kv4", "kronecker", effort=effort) for effort in ("fast", "standard", "best")}
    assert [options.samples for options in found.values()] == [128, 128, 128]
    assert [options.learns for options in found.values()] == [False, True, True]
    assert ExportOptions("w4a4kv4", "kronecker", effort="fast", calib_samples=24).samples == 24


@pytest.mark.parametrize(
    ("scheme", "line"),
    [
        ("w4a16", "but scheme w4a16 leaves it float; write for example w4a16kv8"),
        ("w3a3kv3", "the cache of GroupQueryAttention has 4 or 8 bits; use kv4 or kv8, or --kv-scales dynamic"),
    ],
)
def test_where_a_cache_cannot_be_static_one_line_says_so(scheme: str, line: str) -> None:
    with pytest.raises(UsageError, match=line) as refusal:
        ExportOptions(scheme=scheme, kv_scales="static")
    assert "\n" not in str(refusal.value)


def test_a_static_cache_needs_no_operator_of_ours() -> None:
    found = {scheme: ExportOptions(scheme=scheme, kv_scales="static") for scheme in ("w4a16kv8", "w4a8kv8", "w8a16kv4")}
    assert {options.linear_ops for options in found.values()} == {"matmulnbits"}
    assert ExportOptions(scheme="w4a4kv4", kv_scales="static").linear_ops == "bdq"
    assert not ExportOptions(scheme="w4a16kv8").has_static_cache, "measured for each token unless asked otherwise"


@given(SCHEMES)
def test_every_scheme_can_be_exported(scheme: QuantScheme) -> None:
    options = ExportOptions(scheme=str(scheme))
    assert options.linear_ops in ("matmulnbits", "bdq")
    assert ExportOptions(scheme=str(scheme), ops="bdq").linear_ops == "bdq"


@pytest.mark.parametrize(
    ("scheme", "ops", "linear_ops", "block"),
    [
        ("w4a16", "auto", "matmulnbits", 32),
        ("w4a16kv4", "auto", "matmulnbits", 32),
        ("w4a8", "auto", "matmulnbits", 32),
        ("w4a8", "bdq", "bdq", 0),
        ("w4a16", "bdq", "bdq", 32),
        ("w3a16", "auto", "bdq", 32),
        ("w2a4", "auto", "bdq", 0),
        ("w3a3kv3", "auto", "bdq", 0),
        ("w16a8", "auto", "bdq", 0),
        ("w8a8", "qdq", "qdq", 0),
    ],
)
def test_stock_operators_where_they_express_the_scheme(scheme: str, ops: str, linear_ops: str, block: int) -> None:
    options = ExportOptions(scheme=scheme, ops=ops)
    assert (options.linear_ops, options.scale_block) == (linear_ops, block)


@pytest.mark.parametrize(("asked", "block"), [(None, 0), (0, 0), (64, 64)])
def test_a_given_block_size_wins(asked: int | None, block: int) -> None:
    assert ExportOptions(scheme="w4a4", block_size=asked).scale_block == block


def test_the_last_matching_keep_pattern_wins() -> None:
    options = ExportOptions(keep=("model.layers.*=8", "*.down_proj=16"))
    assert options.bits_of("model.layers.0.mlp.down_proj") == 16
    assert options.bits_of("model.layers.0.mlp.up_proj") == 8
    assert options.bits_of("lm_head") is None


def test_block_sizes_are_numbers_or_channel() -> None:
    assert parse_block_size(None) is None
    assert parse_block_size("channel") == 0
    assert parse_block_size("64") == 64
    with pytest.raises(UsageError, match="block size"):
        parse_block_size("0")


def test_keep_splits_at_the_last_equals_sign() -> None:
    assert parse_keep("a=b=4") == ("a=b", 4)


@pytest.mark.parametrize(
    ("options", "learns", "samples"),
    [
        ({}, False, 24),
        ({"effort": "best"}, True, 128),
        ({"scheme": "w4a4kv4"}, True, 128),
        ({"scheme": "w4a4kv4", "effort": "fast"}, False, 24),
        ({"scheme": "w4a4kv4", "transform": "none", "weights": "rtn"}, False, 24),
        ({"scheme": "w4a8kv8"}, False, 24),
        ({"scheme": "w2a16"}, True, 128),
        ({"scheme": "w4a16", "target_bits": 3.5}, True, 128),
        ({"scheme": "w8a8", "ops": "qdq"}, False, 24),
        ({"scheme": "w16a4"}, False, 24),
        ({"scheme": "w4a4kv4", "calib_samples": 7}, True, 7),
        ({"scheme": "w4a4kv4", "transform": "spin", "effort": "fast"}, False, 128),
        ({"scheme": "w4a4kv4", "transform": "spin", "effort": "fast", "calib_samples": 7}, False, 7),
        ({"scheme": "w4a4kv4", "transform": "spin", "effort": "best"}, True, 128),
        ({"scheme": "w16a4", "transform": "spin"}, False, 128),
    ],
)
def test_what_is_learned_and_from_how_much_text(options: dict[str, object], learns: bool, samples: int) -> None:
    resolved = ExportOptions(**options)  # type: ignore[arg-type]
    assert (resolved.learns, resolved.samples) == (learns, samples)


@pytest.mark.parametrize(
    ("options", "weighs"),
    [
        ({}, False),
        ({"effort": "best"}, True),
        ({"scheme": "w2a16"}, False),
        ({"scheme": "w8a16", "effort": "best"}, False),
        ({"scheme": "w4a4kv4"}, True),
        ({"scheme": "w4a4kv4", "effort": "fast"}, False),
        ({"scheme": "w4a4kv4", "weights": "rtn"}, False),
        ({"scheme": "w8a4", "effort": "best"}, False),
        ({"scheme": "w8a4", "target_bits": 5.0}, True),
        ({"scheme": "w16a4"}, False),
        ({"scheme": "w3a3kv3", "effort": "best"}, True),
    ],
)
def test_when_gptq_weighs_outputs(options: dict[str, object], weighs: bool) -> None:
    assert ExportOptions(**options).weighs_outputs is weighs  # type: ignore[arg-type]


def test_scales_are_learned_faster_where_rounding_costs_much() -> None:
    coarse = [ExportOptions(scheme=scheme) for scheme in ("w4a4kv4", "w2a16", "w4a3")]
    fine = [ExportOptions(scheme=scheme, effort="best") for scheme in ("w4a16", "w4a8kv8", "w8a16")]
    rates = [{tuning_options(each).rate for each in group} for group in (coarse, fine)]
    assert rates == [{3e-3}, {5e-4}]
