"""What a calibration is known by: what options left out stand for, and which version of the work it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from bdq_export.calibration.text import read_text
from bdq_export.commands import compare
from bdq_export.options import ExportOptions
from bdq_export.resume import fingerprint as module


def of_a_calibration(options: ExportOptions) -> object:
    return module.fingerprint(SimpleNamespace(content_hash=lambda: "12", tokenizer_files=()), options)  # type: ignore[arg-type]


def of_a_row(options: ExportOptions) -> object:
    return compare._key(compare._Job(options.scheme, "bdq", options.seed, options))


@pytest.mark.parametrize("identity", [of_a_calibration, of_a_row])
def test_work_of_other_defaults_is_other_work(identity, monkeypatch) -> None:
    options = ExportOptions("w4a4kv4")
    before = identity(options)
    assert identity(ExportOptions("w4a4kv4", calib_samples=128)) == before
    assert identity(ExportOptions("w4a4kv4", calib_samples=64)) != before
    assert identity(ExportOptions("w4a4kv4", calib_seq_len=512)) == before
    assert identity(ExportOptions("w4a4kv4", calib_seq_len=256)) != before
    monkeypatch.setattr("bdq_export.options._SAMPLES", {"fast": 24, "standard": 64, "best": 128})
    assert identity(options) != before, "the default was another"
    monkeypatch.undo()
    assert identity(options) == before
    for place in (module, compare):
        monkeypatch.setattr(place, "FORMAT", module.FORMAT + 1)
    assert identity(options) != before, "a calibration does other things"


@pytest.mark.parametrize("identity", [of_a_calibration, of_a_row])
def test_static_scales_of_the_cache_are_other_work(identity) -> None:
    assert identity(ExportOptions("w4a16kv8")) != identity(ExportOptions("w4a16kv8", kv_scales="static"))


@pytest.mark.parametrize("identity", [of_a_calibration, of_a_row])
@pytest.mark.parametrize(
    "other", [b"\xef\xbb\xbfOne.\nTwo.\n", b"One.\r\nTwo.\r\n"], ids=["byte order mark", "line ends"]
)
def test_text_that_has_other_tokens_is_other_text(identity, other, tmp_path: Path) -> None:
    contents = {"text.txt": b"One.\nTwo.\n", "copy.txt": b"One.\nTwo.\n", "other.txt": other}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert len({read_text(tmp_path / name) for name in contents}) == 2, "calibration reads the same"
    text, copy, changed = (identity(ExportOptions(calib=str(tmp_path / name))) for name in contents)
    assert text == copy
    assert text != changed


def test_options_of_later_stages_may_change_unless_they_decide_what_bits_there_are() -> None:
    def same(change: dict[str, object], **options: object) -> bool:
        one, other = (ExportOptions(**{**options, **each}) for each in ({}, change))  # type: ignore[arg-type]
        return of_a_calibration(one) == of_a_calibration(other)

    assert same({"accuracy_level": 0, "full_logits": True, "min_top1": 0.5})
    assert same({"full_logits": True, "min_top1": 0.5}, target_bits=3.5)
    assert not same({"accuracy_level": 0}, target_bits=3.5), "8 bits are a choice at accuracy level 4 only"
    assert same({"accuracy_level": 1}, target_bits=3.5, accuracy_level=0)
