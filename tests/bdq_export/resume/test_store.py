"""Records come back bit by bit; what is damaged, missing or of another calibration never does."""

from __future__ import annotations

import json
import os

import pytest
import torch
from calibrations import same

from bdq_export.errors import InvalidInputError, ResourceError, UsageError
from bdq_export.resume import Record, open_store
from bdq_export.resume.record import from_bytes, merged

GENERATOR = torch.Generator().manual_seed(1)
SHARED = torch.randn(4, generator=GENERATOR)
RECORD = Record(
    {"a": 0.1 + 0.2, "nested": {"z": [1, None, "ü"], "b": float("inf")}},
    {"x": torch.randn(3, 5, generator=GENERATOR).double(), "empty": torch.empty(0, 2), "one": SHARED, "two": SHARED},
)
PRINT = {"model": "abc", "seed": 0, "keep": ["a"]}


def keep(record: Record) -> Record:
    return record


def test_a_record_comes_back_bit_by_bit(tmp_path):
    open_store(tmp_path / "new" / "folder", PRINT).save("one", RECORD)
    found = open_store(tmp_path / "new" / "folder", PRINT).load("one", keep)
    assert found is not None
    assert same(found.values, RECORD.values)
    assert sorted(found.tensors) == sorted(RECORD.tensors)
    assert all(same(found.tensors[name], value) for name, value in RECORD.tensors.items())


def test_parts_are_apart():
    both = from_bytes(merged({"a": RECORD, "b": Record({"k": 1})}).to_bytes())
    assert same(both.part("a").values, RECORD.values)
    assert set(both.part("a").tensors) == set(RECORD.tensors)
    assert both.part("b").tensors == {}
    with pytest.raises(KeyError):
        both.part("c")


def test_no_file_is_left_beside_the_records(tmp_path):
    store = open_store(tmp_path, PRINT)
    for _ in range(2):
        store.save("one", RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fingerprint.json", "one.json", "one.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "one.safetensors").write_bytes((folder / "one.safetensors").read_bytes()[:-1]),
        lambda folder: _flip(folder / "one.safetensors", -1),
        lambda folder: _flip(folder / "one.safetensors", 40),
        lambda folder: (folder / "one.safetensors").write_bytes(b""),
        lambda folder: (folder / "one.json").write_text("{"),
        lambda folder: (folder / "one.json").write_text('{"bytes": 1, "sha256": "0"}'),
    ],
)
def test_what_is_damaged_is_not_read_and_nothing_after_it(damage, tmp_path, caplog):
    first = open_store(tmp_path, PRINT)
    first.save("one", RECORD)
    first.save("two", RECORD)
    damage(tmp_path)
    store = open_store(tmp_path, PRINT)
    assert store.load("one", keep) is None
    assert "damaged" in caplog.text
    assert store.load("two", keep) is None, "it may belong to another first record"


@pytest.mark.parametrize("name", ["one.json", "one.safetensors"])
def test_half_a_record_is_none(name, tmp_path, caplog):
    open_store(tmp_path, PRINT).save("one", RECORD)
    (tmp_path / name).unlink()
    assert open_store(tmp_path, PRINT).load("one", keep) is None
    assert not caplog.text


def test_a_valid_record_of_something_else_is_not_taken(tmp_path, caplog):
    open_store(tmp_path, PRINT).save("one", RECORD)
    assert open_store(tmp_path, PRINT).load("one", lambda record: record.tensors["codes"]) is None
    assert "damaged" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0, is 1"),
        ({"model": "x" * 64}, 'model was "abc", is "xxx'),
        ({"keep": []}, 'keep was ["a"], is []'),
        ({"more": 1}, "more was not given, is 1"),
    ],
)
def test_another_calibration_is_refused_and_named(change, message, tmp_path):
    open_store(tmp_path, PRINT).save("one", RECORD)
    with pytest.raises(UsageError) as refusal:
        open_store(tmp_path, {**PRINT, **change})
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert open_store(tmp_path, PRINT).load("one", keep) is not None, "the refusal changed something"


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(UsageError, match=r"fingerprint\.json"):
        open_store(tmp_path, PRINT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_damaged_fingerprint_is_refused(tmp_path):
    (tmp_path / "fingerprint.json").write_text('{"model": ')
    with pytest.raises(InvalidInputError, match="JSON"):
        open_store(tmp_path, PRINT)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="cannot be written"):
        open_store(tmp_path / "file", PRINT)


def test_a_full_disk_is_told_and_leaves_the_old_files(tmp_path, monkeypatch):
    store = open_store(tmp_path, PRINT)
    store.save("one", RECORD)

    def full(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="disk"):
        store.save("two", RECORD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fingerprint.json", "one.json", "one.safetensors"]


def test_the_fingerprint_is_plain_json(tmp_path):
    open_store(tmp_path, {"keep": ("a", "b")})
    assert json.loads((tmp_path / "fingerprint.json").read_text()) == {"keep": ["a", "b"]}
    open_store(tmp_path, {"keep": ("a", "b")})


def _flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
