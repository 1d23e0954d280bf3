"""A GGUF file written the way llama.cpp does becomes the model it was made from."""

from __future__ import annotations

import os

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bdq_export.checkpoint import convert_gguf, open_checkpoint
from bdq_export.checkpoint.gguf_file import read_gguf
from bdq_export.errors import BdqError, InvalidInputError, ResourceError, UnsupportedModelError
from bdq_models.gguf_families import GGUF_FAMILIES

BYTES = [f"<0x{value:02X}>" for value in range(256)]


def interleaved(weight, heads):
    """llama.cpp's `permute`: channels i and i + d/2 of a head side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def stored_tensors(name, tiny):
    """GGUF name -> float32 array."""
    family, tensors = GGUF_FAMILIES[name], {}
    inner = {path: module for module, path in family.names}
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for full, tensor in tiny.weights.items():
        module, _, kind = full.rpartition(".")
        values = tensor.numpy()
        if module in top:
            new = top[module]
        else:
            _, _, index, path = module.split(".", 3)
            new = f"blk.{index}.{inner[path]}"
        if name == "llama" and new.endswith(("attn_q", "attn_k")):
            heads = tiny.dimensions.heads if new.endswith("q") else tiny.dimensions.kv_heads
            values = interleaved(values, heads)
        if name == "gemma3" and new.endswith("norm"):
            values = values + np.float32(1)
        tensors[f"{new}.{kind}"] = np.ascontiguousarray(values)
    return tensors


def write_gguf(path, name, tiny, quantize=None, skip=(), **fields):
    """Write `tiny` as the GGUF architecture `name`; `fields` (dots as __) replace or, with None, remove metadata."""
    dimensions = tiny.dimensions
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "▁", "a", "b", "ab", "▁ab"]
    metadata = {
        f"{name}.context_length": dimensions.context_length,
        f"{name}.block_count": dimensions.layers,
        f"{name}.embedding_length": dimensions.hidden_size,
        f"{name}.feed_forward_length": dimensions.intermediate_size,
        f"{name}.attention.head_count": dimensions.heads,
        f"{name}.attention.head_count_kv": dimensions.kv_heads,
        f"{name}.attention.key_length": dimensions.head_dim,
        f"{name}.attention.sliding_window": dimensions.sliding_window,
        f"{name}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{name}.rope.freq_base": 10000.0 if name == "llama" else 1e6,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-5.0, -4.0, -3.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    metadata.update({key.replace("__", "."): value for key, value in fields.items()})
    writer = gguf.GGUFWriter(path, name)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for key, value in stored_tensors(name, tiny).items():
        if key in skip:
            continue
        if quantize is not None and value.ndim == 2:
            writer.add_tensor(key, gguf.quantize(value, quantize), raw_dtype=quantize)
        else:
            writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tiny_model):
    """Sizes that Q8_0 blocks of 32 divide."""
    return {
        "llama": tiny_model("llama", hidden_size=128, num_attention_heads=8, num_key_value_heads=2),
        "gemma3": tiny_model(
            "gemma3",
            num_hidden_layers=7,
            layer_types=["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"],
        ),
    }


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_same_model(name, tiny, tmp_path):
    """The weights are bit-equal and transformers computes the same logits from the written folder."""
    from transformers import AutoModelForCausalLM

    from bdq_export.float_model import load_float_model

    source = write_gguf(tmp_path / "m.gguf", name, tiny[name])
    checkpoint = open_checkpoint(source, work_dir=tmp_path / "work")
    weights = checkpoint.weights()
    assert weights.keys() == tiny[name].weights.keys()
    for key, expected in tiny[name].weights.items():
        close = torch.equal if name == "llama" else torch.allclose  # w + 1 - 1 rounds
        assert close(weights[key], expected), key
    tokens = torch.arange(3, 43).reshape(1, 40)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)(tokens).logits
        theirs = load_float_model(tiny[name], tiny[name].weights)(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_quantized(tiny, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"], quantize=gguf.GGMLQuantizationType.Q8_0)
    weights = open_checkpoint(source, work_dir=tmp_path).weights()
    for key, expected in tiny["llama"].weights.items():
        error = (weights[key] - expected).abs().max() / expected.abs().max()
        assert error < 0.01, key
        assert (float(error) > 0) == (expected.dim() == 2)


def test_memory_is_bounded_by_rows(tiny, tmp_path, monkeypatch):
    """Chunks of one row give the same file as one chunk."""
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"], quantize=gguf.GGMLQuantizationType.Q8_0)
    convert_gguf(source, tmp_path / "a")
    monkeypatch.setattr("bdq_export.checkpoint.gguf_weights._CHUNK_VALUES", 1)
    convert_gguf(source, tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_config_and_side_files(tiny, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", "gemma3", tiny["gemma3"], tokenizer__ggml__eot_token_id=5)
    checkpoint = open_checkpoint(source, work_dir=tmp_path)
    assert checkpoint.config["rms_norm_eps"] == 1e-6
    assert checkpoint.config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"]
    assert checkpoint.config["query_pre_attn_scalar"] == checkpoint.dimensions.head_dim
    assert checkpoint.dimensions == tiny["gemma3"].dimensions
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": [2, 5]}
    assert (checkpoint.directory / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_conversion_is_used_again(tiny, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"])
    first = open_checkpoint(source, work_dir=tmp_path)
    marker = first.directory / "marker"
    marker.touch()
    assert open_checkpoint(source, work_dir=tmp_path).directory == first.directory
    assert marker.exists()
    with pytest.raises(InvalidInputError, match="work folder"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"llama__rope__scaling__type": "linear"}, UnsupportedModelError, "rope.scaling.type"),
        ({"llama__expert_count": 8}, UnsupportedModelError, "expert_count"),
        ({"llama__rope__dimension_count": 8}, UnsupportedModelError, "8 of 16"),
        ({"llama__block_count": None}, InvalidInputError, "llama.block_count is None"),
        ({"llama__attention__head_count_kv": [2, 2, 2]}, InvalidInputError, "head_count_kv"),
        ({"llama__attention__head_count": 5, "llama__attention__key_length": 16}, InvalidInputError, "5 heads"),
        ({"llama__block_count": 4}, InvalidInputError, "missing"),
        ({"tokenizer__ggml__model": "rwkv"}, UnsupportedModelError, "'rwkv'"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "odd"}, UnsupportedModelError, "'odd'"),
        ({"tokenizer__ggml__model": "gpt2"}, InvalidInputError, "merges"),
        ({"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__merges": ["x y"]}, InvalidInputError, "inconsistent"),
        ({"tokenizer__ggml__tokens": None}, InvalidInputError, "tokenizer.ggml.tokens"),
        ({"tokenizer__ggml__scores": [1.0]}, InvalidInputError, "scores"),
        ({"tokenizer__ggml__scores": ["x"] * 264}, InvalidInputError, "scores"),
        ({"tokenizer__ggml__token_type": ["x"] * 264}, InvalidInputError, "token_type"),
        ({"llama__expert_count": [0, 0]}, UnsupportedModelError, "expert_count"),
    ],
)
def test_refused(tiny, tmp_path, fields, kind, words):
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"], **fields)
    with pytest.raises(kind, match=words) as caught:
        open_checkpoint(source, work_dir=tmp_path / "work").weights()
    assert caught.type is kind
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("work/.*"))


def test_incomplete(tiny, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"], skip=["blk.1.ffn_up.weight"])
    with pytest.raises(InvalidInputError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        open_checkpoint(source, work_dir=tmp_path)


def test_unknown_family(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="'mamba'; supported in GGUF: llama, gemma3"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


def test_unknown_tensor(tiny, tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"])
    path.write_bytes(path.read_bytes().replace(b"output_norm", b"rope_freqss"))
    with pytest.raises(InvalidInputError, match="rope_freqss"):
        convert_gguf(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_regular_file(tmp_path):
    (tmp_path / "d.gguf").mkdir()
    os.mkfifo(tmp_path / "f.gguf")
    for name in ("d.gguf", "f.gguf"):
        with pytest.raises(InvalidInputError, match="no regular file"):
            open_checkpoint(tmp_path / name, work_dir=tmp_path / "work")
    assert not (tmp_path / "work").exists()


def test_existing_folder_is_kept(tiny, tmp_path):
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(InvalidInputError, match="not empty"):
        convert_gguf(source, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    with pytest.raises(InvalidInputError, match="No such file"):
        convert_gguf(source, tmp_path / "none" / "out")


def test_full_disk_leaves_nothing(tiny, tmp_path, monkeypatch):
    source = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bdq_export.checkpoint.gguf.write_safetensors", full)
    with pytest.raises(ResourceError, match="No space left"):
        convert_gguf(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no GGUF file"),
        (b"PK\x03\x04" + b"\0" * 40, "does not start"),
        (b"GGUF\x01\0\0\0" + b"\0" * 40, "version 1"),
        (b"GGUF\0\0\0\x03" + b"\0" * 40, "little endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "claims"),
        (b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 8, "truncated"),
        # one field "k": an array of 2^60 bytes; an array of 2^60 strings; an array of arrays
        (
            b"GGUF\x03\0\0\0"
            + bytes(8)
            + b"\x01"
            + bytes(7)
            + b"\x01"
            + bytes(7)
            + b"k\t\0\0\0\0\0\0\0"
            + bytes(7)
            + b"\x10",
            "truncated",
        ),
        (
            b"GGUF\x03\0\0\0"
            + bytes(8)
            + b"\x01"
            + bytes(7)
            + b"\x01"
            + bytes(7)
            + b"k\t\0\0\0\x08\0\0\0"
            + bytes(7)
            + b"\x10",
            "too short",
        ),
        (
            b"GGUF\x03\0\0\0"
            + bytes(8)
            + b"\x01"
            + bytes(7)
            + b"\x01"
            + bytes(7)
            + b"k\t\0\0\0\t\0\0\0"
            + bytes(7)
            + b"\x10",
            "arrays of",
        ),
    ],
)
def test_malformed_header(tmp_path, content, words):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(InvalidInputError, match=words):
        read_gguf(tmp_path / "m.gguf")


def test_truncated(tiny, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny["llama"])
    content = path.read_bytes()
    for size in (len(content) - 100, len(content) // 2, 5000, 100, 30):
        path.write_bytes(content[:size])
        with pytest.raises(InvalidInputError, match=r"truncated|beyond|too short"):
            convert_gguf(path, tmp_path / "out")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 6000), value=st.binary(min_size=1, max_size=9))
def test_mutated_header(tiny_model, tmp_path_factory, position, value):
    """A damaged file converts or is refused; nothing else."""
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_gguf(folder / "m.gguf", "llama", tiny_model("llama", num_hidden_layers=1))
    content = path.read_bytes()
    path.write_bytes(content[:position] + value + content[position + len(value) :])
    try:
        convert_gguf(path, folder / "out")
    except BdqError:
        assert not (folder / "out").exists()
