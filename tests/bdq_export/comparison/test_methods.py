"""Methods are export options, and what cannot be meant is refused before anything runs."""

from __future__ import annotations

from dataclasses import fields

import pytest

from bdq_export.cli.list_options import LISTS, written_out
from bdq_export.comparison.methods import DEFAULT, METHODS, parse_method, split_list
from bdq_export.errors import UsageError
from bdq_export.options import ExportOptions

SHARED = {"calib": "self", "calib_samples": None, "calib_seq_len": None}


def test_every_method_is_options_of_w4a4kv4_and_one_alone_learns() -> None:
    found = {name: method.options("w4a4kv4", 3, SHARED) for name, method in METHODS.items()}
    assert set(DEFAULT) <= set(found)
    assert [name for name, options in found.items() if options.learns] == ["bdq-learned"]
    assert {options.min_top1 for options in found.values()} == {0.0}
    assert {options.seed for options in found.values()} == {3}
    assert len(set(found.values())) == len(found), "two methods are the same"
    assert found["flatquant"].transform == "kronecker"
    assert "auto" not in {options.transform for options in found.values()}


def test_the_better_one_of_two_rivals_is_there_by_default() -> None:
    """One diagonal in front of the rotations has 0.39 of gap where one behind them has 0.66 (docs/compare.md)."""
    assert DEFAULT.index("diag-before") < DEFAULT.index("diag") < DEFAULT.index("bdq")


def test_the_fixed_base_has_gptq_and_clip() -> None:
    base = METHODS["hadamard-clip0.9"].options("w3a3kv3", 0, SHARED)
    assert (base.transform, base.weights, base.activation_clip, base.effort) == ("hadamard", "gptq", 0.9, "fast")


def test_the_learned_rotation_has_gptq_searched_clips_and_as_much_text_as_what_learns() -> None:
    spin = METHODS["spin"].options("w4a4kv4", 0, SHARED)
    assert (spin.transform, spin.weights, spin.activation_clip, spin.learns) == ("spin", "gptq", None, False)
    assert spin.samples == METHODS["bdq-learned"].options("w4a4kv4", 0, SHARED).samples
    assert "spin" in DEFAULT
    with pytest.raises(UsageError, match="spin learns rotations by how activations are rounded"):
        METHODS["spin"].options("w4a16", 0, SHARED)


def test_options_follow_a_method() -> None:
    text = "bdq-learned+loss=rce+loss-delta=0.25+symmetric=true+target_bits=none+keep=*.v_proj=8+calib=some.txt"
    method = parse_method(text)
    options = method.options("w4a4kv4", 0, {**SHARED, "calib_samples": 7})
    assert method.name == text
    expected = ExportOptions(
        scheme="w4a4kv4",
        transform="bdq",
        loss="rce",
        loss_delta=0.25,
        keep=("*.v_proj=8",),
        calib="some.txt",
        calib_samples=7,
        min_top1=0.0,
    )
    assert options == expected


def test_what_calibrates_nothing_does_without_the_options_of_calibration() -> None:
    shared = {"calib": "text.txt", "calib_samples": 7, "calib_seq_len": 64}
    plain, rounded, gptq = (METHODS[name].options("w4a16", 0, shared) for name in ("rtn", "hadamard-rtn", "gptq"))
    assert (plain.calibrates, plain.calib, plain.calib_samples, plain.calib_seq_len) == (False, "self", None, None)
    for options in (rounded, gptq, METHODS["rtn"].options("w4a4kv4", 0, shared)):
        assert options.calibrates
        assert {name: getattr(options, name) for name in shared} == shared
    with pytest.raises(UsageError, match="--calib-samples: --transform none --weights rtn calibrates nothing"):
        parse_method("rtn+calib_samples=5").options("w4a16", 0, shared)


def test_signs_that_part_methods_and_options_may_be_inside_of_a_value() -> None:
    given = ["rtn,bdq+calib=a\\+b\\,c.txt+keep=*.v_proj=8\\,lm_head=4", "gptq+block_size=channel"]
    rtn, text, blocks = split_list(given)
    assert rtn == "rtn"
    assert parse_method(text).changes == {"calib": "a+b,c.txt", "keep": ("*.v_proj=8", "lm_head=4")}
    assert parse_method(text).name == text
    options = parse_method(blocks).options("w4a16", 0, SHARED)
    assert (options.block_size, options.scale_block) == (0, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spun", "method 'spun' is unknown, expected one of rtn, gptq"),
        ("", "is unknown"),
        ("bdq+loss", "OPTION=VALUE"),
        ("bdq+los=rce", "OPTION one of"),
        ("bdq+scheme=w4a16", "OPTION one of"),
        ("bdq+seed=1", "OPTION one of"),
        ("bdq+min_top1=0.5", "OPTION one of"),
        ("bdq+calib=a+b.txt", r"'b.txt' is not OPTION=VALUE"),
        ("bdq+calib=a+b.txt", r"write \+ for a + inside of a value"),
        ("b.txt", r"write \, for a comma inside of a value"),
        ("bdq+symmetric=yes", "expected true or false"),
        ("bdq+block_size=big", "block_size is 'big', expected int"),
    ],
)
def test_a_method_that_is_none(text: str, words: str) -> None:
    with pytest.raises(UsageError, match="method") as refusal:
        parse_method(text)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_every_option_can_be_written_behind_a_method() -> None:
    texts = {"tuple[str, ...]": "a=8", "bool": "false", "int": "1", "float": "0.5", "str": "x"}
    for each in fields(ExportOptions):
        if each.name in ("scheme", "seed", "min_top1"):
            continue
        kind = str(each.type).removesuffix(" | None")
        (value,) = parse_method(f"bdq+{each.name}={texts[kind]}").changes.values()
        assert type(value).__name__ == kind.partition("[")[0]


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("M --seeds 0 1 2 --out O", "M --seeds 0 --seeds 1 --seeds 2 --out O"),
        ("M --seeds 0 --seeds 1 2", "M --seeds 0 --seeds 1 --seeds 2"),
        ("--schemes a b --methods c,d e --json M", "--schemes a --schemes b --methods c,d --methods e --json M"),
        ("--seeds=0 M", "--seeds=0 M"),
        ("--seeds", "--seeds"),
        ("--seeds -- 0 1", "--seeds -- 0 1"),
        ("--calib a b", "--calib a b"),
    ],
)
def test_lists_end_at_the_next_option(given: str, written: str) -> None:
    assert written_out(given.split(), LISTS) == written.split()
