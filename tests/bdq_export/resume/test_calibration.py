"""A calibration that is ended anywhere and started again gives every bit of one that was not."""

from __future__ import annotations

import dataclasses

import pytest
from calibrations import calibrate_tiny, same

from bdq_export.learning import block_stage
from bdq_export.resume import open_store
from bdq_export.resume.codecs import quantized_from, quantized_record, transforms_from, transforms_record
from bdq_export.resume.record import from_bytes

SCHEMES = {
    "learned": {"scheme": "w4a4kv4", "transform": "bdq"},
    "learned by block, too": {"scheme": "w4a4kv4", "transform": "bdq", "effort": "best"},
    "rotations": {"scheme": "w4a4kv4", "transform": "spin", "effort": "fast"},
    "learned by block alone": {"scheme": "w4a4kv4", "transform": "kronecker", "effort": "fast"},
    "chosen": {"scheme": "w4a8kv8", "effort": "fast", "ops": "bdq"},
    "two runs of GPTQ, bits": {"scheme": "w4a16", "target_bits": 3.5, "effort": "fast", "transform": "auto"},
    "static cache": {"scheme": "w4a8kv4", "kv_scales": "static", "transform": "bdq", "effort": "fast"},
    "rounded, asymmetric": {"scheme": "w4a16", "weights": "rtn", "transform": "smooth", "symmetric": False},
}
LONG = ("learned by block, too", "rotations")


class Ended(Exception):  # noqa: N818 - no error
    """As sudden as a signal."""


class Dying:
    """A store whose process ends right after its `count`-th record."""

    def __init__(self, store, count):
        self.store, self.left, self.names, self.read = store, count, [], []

    def load(self, name, decode):
        found = self.store.load(name, decode)
        if found is not None:
            self.read.append(name)
        return found

    def save(self, name, record):
        self.store.save(name, record)
        self.names.append(name)
        self.left -= 1
        if not self.left:
            raise Ended(name)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch):
    monkeypatch.setattr(block_stage, "_FLATQUANT_STEPS", 8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory, write_model):
    """A model folder, for its tokenizer."""
    return write_model(tmp_path_factory.mktemp("resume") / "model")


@pytest.mark.parametrize(
    "case",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SCHEMES],
)
def test_ended_after_every_record_and_started_again(case, directory, tiny_model, tmp_path):
    tiny, options = tiny_model("llama", num_hidden_layers=2), SCHEMES[case]
    expected = calibrate_tiny(tiny, directory, **options)
    fingerprint = {"case": case}
    names = []
    for _ in range(40):
        # Dies after one new record each time: the state is read back at every point there is.
        store = Dying(open_store(tmp_path / "progress", fingerprint), 1)
        try:
            found = calibrate_tiny(tiny, directory, store, **options)
        except Ended:
            names += store.names
            continue
        break
    else:
        pytest.fail("it never ended")
    assert same(found, expected), [
        field.name
        for field in dataclasses.fields(found)
        if not same(getattr(found, field.name), getattr(expected, field.name))
    ]
    assert store.read[:2] == ["tokens", "transform"]
    blocks = [name for name in names if "-block-" in name]
    assert len(set(blocks)) == len(blocks), "a block was done twice"
    learns = case.startswith("learned") and options.get("effort") != "fast"
    assert ("learned-scales" in names) == learns
    if options.get("weights") != "rtn":
        assert len(blocks) in (2, 4)
    if "target_bits" in options:
        assert "gptq-bits" in names


def test_a_damaged_block_is_done_again_with_the_same_result(directory, tiny_model, tmp_path):
    tiny, options = (
        tiny_model("qwen3", num_hidden_layers=2),
        {"scheme": "w4a4kv4", "transform": "bdq", "effort": "fast"},
    )
    expected = calibrate_tiny(tiny, directory, open_store(tmp_path, {}), **options)
    block = tmp_path / "gptq-block-0000.safetensors"
    data = bytearray(block.read_bytes())
    data[-1] ^= 1
    block.write_bytes(bytes(data))
    store = Dying(open_store(tmp_path, {}), 1000)
    assert same(calibrate_tiny(tiny, directory, store, **options), expected)
    assert store.read == ["tokens", "transform"]
    assert store.names == ["gptq-block-0000", "gptq-block-0001"]
    data[-1] ^= 1
    assert block.read_bytes() == bytes(data)


@pytest.mark.parametrize("transform", ["bdq", "kronecker"])
def test_records_of_transforms_and_weights_are_exact(transform, directory, tiny_model):
    tiny = tiny_model("llama", num_hidden_layers=2)
    result = calibrate_tiny(tiny, directory, scheme="w3a3kv3", transform=transform, effort="fast")
    assert {online.kronecker is not None for online in result.transforms.online.values()} == {transform == "kronecker"}
    assert result.transforms.diagonals_before
    record = from_bytes(transforms_record(result.transforms).to_bytes())
    assert same(transforms_from(record), result.transforms)
    weights = dict(result.quantized)
    assert same(quantized_from(from_bytes(quantized_record(weights).to_bytes())), weights)
