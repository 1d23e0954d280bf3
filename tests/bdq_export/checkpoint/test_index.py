"""Shards: only plain names of regular files inside the folder, and an index that tells the truth."""

from __future__ import annotations

import json
import os
import socket

import pytest
from safetensors.torch import load_file, save_file

from bdq_export.checkpoint import open_checkpoint
from bdq_export.errors import InvalidInputError

INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(model_dir):
    """A model folder in two shards, and its weight_map."""
    directory = model_dir()
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: SHARDS[position % 2] for position, name in enumerate(names)}
    for shard in SHARDS:
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, directory / shard)
    (directory / "model.safetensors").unlink()
    write_index(directory, weight_map)
    return directory, weight_map


def write_index(directory, weight_map):
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def test_shards_equal_one_file(sharded, tiny_model):
    directory, _ = sharded
    checkpoint = open_checkpoint(directory)
    assert [path.name for path in checkpoint.files] == list(SHARDS)
    weights = checkpoint.weights()
    expected = tiny_model("llama").weights
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\model.safetensors",
        "\\\\server\\share\\x.safetensors",
        "sub/model.safetensors",
        "a\0b.safetensors",
        "..",
        "",
        "x" * 300 + ".safetensors",
        7,
        None,
        ["a"],
    ],
)
def test_index_with_a_path(sharded, refused, name):
    directory, weight_map = sharded
    write_index(directory, {**weight_map, "model.norm.weight": name})
    refused(directory, InvalidInputError, INDEX)


def test_index_naming_a_pickle(sharded, refused):
    directory, weight_map = sharded
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    write_index(directory, {**weight_map, "model.norm.weight": "pytorch_model.bin"})
    refused(directory, InvalidInputError, INDEX, "pytorch_model.bin", "only .safetensors")


def test_missing_shard(sharded, refused):
    directory, _ = sharded
    (directory / SHARDS[1]).unlink()
    refused(directory, InvalidInputError, SHARDS[1], "missing", "download")


def test_case_of_a_name_matters(sharded, refused):
    directory, weight_map = sharded
    write_index(directory, {name: shard.replace("model-", "Model-") for name, shard in weight_map.items()})
    refused(directory, InvalidInputError, "Model-0000", "missing")


def test_index_lies_about_a_shard(sharded, refused):
    directory, weight_map = sharded
    write_index(directory, {**weight_map, "model.norm.weight": SHARDS[weight_map["model.norm.weight"] == SHARDS[0]]})
    refused(directory, InvalidInputError, INDEX, "model.norm.weight", "disagree")


def test_tensor_in_two_shards(sharded, refused):
    directory, weight_map = sharded
    for shard in SHARDS:
        tensors = load_file(directory / shard)
        tensors["model.norm.weight"] = load_file(directory / weight_map["model.norm.weight"])["model.norm.weight"]
        save_file(tensors, directory / shard)
    refused(directory, InvalidInputError, INDEX, "model.norm.weight", "holds it but")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}', "[", '{"weight_map": {"a": "x", "a": "x"}}']
)
def test_malformed_index(sharded, refused, content):
    directory, _ = sharded
    (directory / INDEX).write_text(content)
    refused(directory, InvalidInputError, INDEX)


def test_truncated_shard(sharded, refused):
    directory, _ = sharded
    path = directory / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-1])
    refused(directory, InvalidInputError, SHARDS[0], "truncated")


@pytest.mark.parametrize("target", ["/etc/hostname", "../outside.safetensors"])
def test_symlink_out_of_the_folder(sharded, refused, target):
    directory, _ = sharded
    path = directory / SHARDS[0]
    path.rename(directory.parent / "outside.safetensors")
    path.symlink_to(target)
    refused(directory, InvalidInputError, SHARDS[0], "symlink", "outside")


@pytest.mark.parametrize("target", ["nowhere", SHARDS[0]])
def test_dangling_symlink_and_loop(sharded, refused, target):
    directory, _ = sharded
    (directory / SHARDS[0]).unlink()
    (directory / SHARDS[0]).symlink_to(target)
    refused(directory, InvalidInputError, SHARDS[0])


def test_symlink_inside_the_folder(sharded):
    directory, _ = sharded
    (directory / SHARDS[0]).rename(directory / "data")
    (directory / SHARDS[0]).symlink_to("data")
    open_checkpoint(directory)


def as_hub_cache(directory, repository, blobs):
    """Move a model folder into a cache layout: snapshot of symlinks, blobs elsewhere."""
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    blobs.mkdir(parents=True)
    for path in directory.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / path.name, snapshot))
    return snapshot


def test_hub_cache(sharded, tmp_path):
    directory, _ = sharded
    repository = tmp_path / "hub" / "models--org--name"
    open_checkpoint(as_hub_cache(directory, repository, repository / "blobs"))


def test_hub_cache_with_blobs_of_another_repository(sharded, tmp_path, refused):
    directory, _ = sharded
    hub = tmp_path / "hub"
    snapshot = as_hub_cache(directory, hub / "models--org--name", hub / "models--org--other" / "blobs")
    refused(snapshot, InvalidInputError, "symlink", "outside")


def special_file(kind, path):
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))


@pytest.mark.parametrize("kind", ["directory", "fifo", "socket"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_not_a_regular_file(model_dir, refused, kind, name, monkeypatch):
    directory = model_dir()
    (directory / name).unlink()
    monkeypatch.chdir(directory)  # a socket's path is limited to 100 bytes
    special_file(kind, directory.relative_to(directory) / name)
    refused(directory, InvalidInputError, name, "regular file")
