"""Only a consistent header of float tensors passes, and everything else is an InvalidInputError."""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from bdq_export.checkpoint import safetensors_header
from bdq_export.checkpoint.safetensors_header import TensorEntry, parse_header, read_header
from bdq_export.errors import InvalidInputError

GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F16", "shape": [0, 7], "data_offsets": [32, 32]},
}


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def file_bytes(header, data=b"\0" * 32):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def test_good_header(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(GOOD))
    assert read_header(path) == {
        "a": TensorEntry("F32", (2, 3), 0, 24),
        "b": TensorEntry("BF16", (4,), 24, 32),
        "empty": TensorEntry("F16", (0, 7), 32, 32),
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated"),
        (b"\x10\0\0", "truncated"),
        (struct.pack("<Q", 1000) + b"{}", "header of 1000 bytes"),
        (struct.pack("<Q", 1 << 62) + b"{}", "header of 4611686018427387904 bytes"),
        (b"PK\x03\x04" + b"\0" * 40, "pickle"),
        (b"\x80\x04\x95" + b"\0" * 40, "pickle"),
        (b"GGUF" + b"\0" * 40, "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (file_bytes(b"[1, 2]"), "does not start with"),
        (file_bytes(b"{\xff}"), "UTF-8"),
        (file_bytes(b'{"a": '), "not valid JSON"),
        (file_bytes(b'{"a": {"x": NaN}}'), "NaN"),
        (file_bytes(b'{"a": {"a": 1, "a": 2}}'), "'a' twice"),
        (file_bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested"),
        (file_bytes(b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}"), "nested"),
        (file_bytes({"__metadata__": {"x": 1}}), "__metadata__"),
        (file_bytes(entry(dtype="I8", offsets=(0, 6))), "already quantized"),
        (file_bytes(entry(dtype="F8_E4M3", offsets=(0, 6))), "already quantized"),
        (file_bytes(entry(dtype="F64", offsets=(0, 48))), "F64"),
        (file_bytes(entry(dtype=3)), "dtype '3'"),
        (file_bytes(entry(shape=[2, -3])), "shape"),
        (file_bytes(entry(shape=[True, 6])), "shape"),
        (file_bytes(entry(shape=[2.0, 3])), "shape"),
        (file_bytes(entry(shape=[1 << 62, 1 << 62])), "needs"),
        (file_bytes(entry(shape=[1] * 9)), "shape"),
        (file_bytes(entry(offsets=[24, 0])), "data_offsets"),
        (file_bytes(entry(offsets=[0, 24, 32])), "data_offsets"),
        (file_bytes(entry(offsets=[0, 20])), "span 20"),
        (file_bytes({"a": {"dtype": "F32", "shape": [1]}}), "exactly"),
        (file_bytes({"a": 7}), "exactly"),
        (file_bytes({"": GOOD["a"]}), "name"),
        (file_bytes({"x" * 600: GOOD["a"]}), "name"),
        (file_bytes({"a": GOOD["a"], "c": GOOD["a"]}, b"\0" * 24), "overlap"),
        (file_bytes(entry(offsets=[8, 32])), "gap"),
        (file_bytes(GOOD, b"\0" * 31), "truncated"),
        (file_bytes(GOOD, b"\0" * 33), "left over"),
    ],
)
def test_bad_header(tmp_path, content, words):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidInputError) as caught:
        read_header(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith("x.safetensors")
    assert "\n" not in str(caught.value)


def test_too_many_entries_are_refused_before_they_are_parsed(monkeypatch):
    monkeypatch.setattr(safetensors_header, "parse_json_object", lambda *_: pytest.fail("parsed"))
    raw = b'{"a":{"data_offsets":[0,0]},' * 100_001
    with pytest.raises(InvalidInputError, match="more than 100000 tensors"):
        parse_header(raw, 0, "x")


def check_like_the_library(tmp_path_factory, content):
    """Whatever we accept, the safetensors library accepts, with the same tensors; else InvalidInputError only."""
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except InvalidInputError:
        return
    try:
        with safe_open(path, framework="pt") as file:
            assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == {  # noqa: SIM118
                name: entry.shape for name, entry in entries.items()
            }
    except SafetensorError as error:
        pytest.fail(f"accepted what the library refuses: {error}")


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 250), value=st.binary(min_size=0, max_size=4), keep=st.integers(0, 400))
def test_mutated_file(tmp_path_factory, position, value, keep):
    good = file_bytes(GOOD)
    content = good[:position] + value + good[position + len(value) :]
    check_like_the_library(tmp_path_factory, content[:keep] if keep < len(good) else content)


sizes = st.one_of(st.integers(-2, 40), st.just(1 << 63), st.booleans(), st.floats(), st.none(), st.text(max_size=2))
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E5M2", "F64"]), sizes),
        "shape": st.one_of(st.lists(sizes, max_size=3), sizes),
        "data_offsets": st.one_of(st.lists(sizes, max_size=3), sizes),
    }
)


@settings(max_examples=150, deadline=None)
@given(header=st.dictionaries(st.text(max_size=3), st.one_of(entries, sizes), max_size=3), data=st.integers(0, 64))
def test_random_header(tmp_path_factory, header, data):
    check_like_the_library(tmp_path_factory, file_bytes(json.dumps(header).encode(), b"\0" * data))


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=60), data=st.integers(0, 64))
def test_random_bytes(raw, data):
    with pytest.raises(InvalidInputError):
        parse_header(b"{" + raw + b"?", data, "x")
