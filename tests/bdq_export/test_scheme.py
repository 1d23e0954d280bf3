"""Schemes and options round-trip, and whatever cannot be meant is a usage error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
        {"scheme": "w4a4kv4"},
        {"scheme": "w3a16"},
        {"scheme": "w16a8"},
        {"ops": "qdq"},
        {"ops": "qdq", "scheme": "w4a16"},
        {"accuracy_level": 5},
        {"scheme": "w8a16", "accuracy_level": 0},
        {"scheme": "w4a8", "accuracy_level": 1},
        {"keep": ("lm_head",)},
        {"keep": ("lm_head=3",)},
        {"calib_samples": 0},
        {"calib_seq_len": 1},
        {"min_top1": 1.5},
        {"seed": -1},
    ],
)
def test_options_that_cannot_be_meant_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        ExportOptions(**change)  # type: ignore[arg-type]


def test_the_last_matching_keep_pattern_wins() -> None:
    options = ExportOptions(keep=("model.layers.*=8", "*.down_proj=16"))
    assert options.bits_of("model.layers.0.mlp.down_proj") == 16
    assert options.bits_of("model.layers.0.mlp.up_proj") == 8
    assert options.bits_of("lm_head") is None


def test_block_sizes_are_numbers_or_channel() -> None:
    assert parse_block_size("channel") is None
    assert parse_block_size("64") == 64
    with pytest.raises(UsageError, match="block size"):
        parse_block_size("0")


def test_keep_splits_at_the_last_equals_sign() -> None:
    assert parse_keep("a=b=4") == ("a=b", 4)
