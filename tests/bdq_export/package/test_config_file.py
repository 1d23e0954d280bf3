"""bdq_config.json round-trips, and says what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bdq_export.errors import InvalidInputError, UsageError
from bdq_export.options import ExportOptions
from bdq_export.package.config_file import dump_config, load_config

OPTIONS = st.builds(
    ExportOptions,
    scheme=st.sampled_from(["w4a16", "w8a16", "w2a16"]),
    transform=st.sampled_from(["auto", "none", "bdq"]),
    block_size=st.sampled_from([None, 32, 128]),
    symmetric=st.booleans(),
    calib=st.sampled_from(["self", "text.txt", "data/text.txt"]),
    calib_samples=st.integers(2, 1000),
    keep=st.lists(st.sampled_from(["lm_head=16", "model.layers.0.*=8"]), max_size=3).map(tuple),
    min_top1=st.none() | st.floats(0, 1),
    seed=st.integers(0, 2**40),
)


@given(options=OPTIONS)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, options: ExportOptions) -> None:
    path = tmp_path_factory.mktemp("config") / "bdq_config.json"
    path.write_bytes(dump_config(options))
    assert load_config(path) == options
    assert dump_config(load_config(path)) == path.read_bytes()


def load(tmp_path: Path, text: str) -> ExportOptions:
    path = tmp_path / "c.json"
    path.write_text(text)
    return load_config(path)


def test_missing_keys_take_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "{}") == ExportOptions()
    assert load(tmp_path, '{"min_top1": 1}').min_top1 == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "w4a16"}', "c.json: unknown key 'schema'; did you mean 'scheme'?"),
        ('{"zzz": 1}', "c.json: unknown key 'zzz'; known keys: scheme, transform"),
        ('{"seed": "0"}', "c.json: 'seed' is '0', expected int"),
        ('{"seed": true}', "c.json: 'seed' is True, expected int"),
        ('{"seed": 1.5}', "c.json: 'seed' is 1.5, expected int"),
        ('{"symmetric": 1}', "c.json: 'symmetric' is 1, expected bool"),
        ('{"keep": "lm_head=8"}', "c.json: 'keep' is 'lm_head=8', expected a list"),
        ('{"keep": [8]}', "c.json: 'keep' is 8, expected str"),
        ('{"seed": 1, "seed": 2}', "c.json: key 'seed' is given twice; keep one"),
        ("[]", "expected a JSON object of options"),
        ('{"seed": }', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_bad_content(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        load(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_values_are_checked_as_flags_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not of the form"):
        load(tmp_path, '{"scheme": "4bit"}')


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no configuration file"):
        load_config(tmp_path / "none.json")


def test_absolute_path_is_not_published(tmp_path: Path) -> None:
    dumped = json.loads(dump_config(ExportOptions(calib=str(tmp_path / "secret" / "text.txt"))))
    assert dumped["calib"] == "text.txt"
    assert json.loads(dump_config(ExportOptions(calib="C:\\secret\\text.txt")))["calib"] == "text.txt"
