"""open_checkpoint: every folder that is no usable model is refused by the most telling reason."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdq_export.checkpoint import hub, open_checkpoint
from bdq_export.errors import InvalidInputError, UnsupportedModelError


def test_good_folder(model_dir):
    directory = model_dir()
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    checkpoint = open_checkpoint(str(directory))
    assert checkpoint.directory == directory
    assert checkpoint.architecture.name == "llama"
    assert checkpoint.dimensions.heads == 9
    assert checkpoint.generation_config == {"eos_token_id": [2, 3]}
    names = [path.name for path in checkpoint.tokenizer_files]
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    assert checkpoint.parameters == sum(
        tensor.numel() for tensor in load_file(directory / "model.safetensors").values()
    )
    assert checkpoint.tensor("model.norm.weight").shape == (144,)
    assert "model.norm.weight" in checkpoint.tensor_names
    with pytest.raises(LookupError, match=r"model\.nothing"):
        checkpoint.tensor("model.nothing")


def test_name_with_spaces_and_letters(model_dir):
    directory = model_dir()
    other = directory.rename(directory.parent / "my modèle 模型")
    assert len(open_checkpoint(other).weights()) == 29


def test_missing(tmp_path, refused):
    refused(tmp_path / "nothing", InvalidInputError, "nothing", "does not exist")


def test_dangling(tmp_path, refused):
    (tmp_path / "link").symlink_to("nothing")
    refused(tmp_path / "link", InvalidInputError, "dangling")


def test_empty(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", InvalidInputError, "empty", "config.json")


def test_file_instead_of_folder(tmp_path, refused):
    (tmp_path / "model.txt").write_text("x")
    refused(tmp_path / "model.txt", InvalidInputError, "is a file", "folder")


def test_no_config(model_dir, refused):
    directory = model_dir()
    (directory / "config.json").unlink()
    refused(directory, InvalidInputError, "no config.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
@pytest.mark.parametrize("with_config", [True, False])
def test_pickle_only(model_dir, refused, name, with_config):
    directory = model_dir()
    (directory / "model.safetensors").rename(directory / name)
    if not with_config:
        (directory / "config.json").unlink()
    refused(directory, InvalidInputError, name, "pickle", "run code", "safe_serialization")


def test_adapter(model_dir, refused):
    directory = model_dir()
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    (directory / "config.json").rename(directory / "adapter_config.json")
    refused(directory, InvalidInputError, "LoRA adapter", "merge")


def test_no_weights(model_dir, refused):
    directory = model_dir()
    (directory / "model.safetensors").unlink()
    refused(directory, InvalidInputError, "neither", "model.safetensors")


def test_unindexed_shard(model_dir, refused):
    directory = model_dir()
    (directory / "model.safetensors").rename(directory / "model-00001-of-00003.safetensors")
    refused(directory, InvalidInputError, "model-00001-of-00003.safetensors", "index.json")


def test_gguf_inside_a_folder(model_dir, refused):
    directory = model_dir()
    (directory / "model.safetensors").rename(directory / "m.gguf")
    refused(directory, InvalidInputError, "m.gguf", "path of that file")


@pytest.mark.parametrize(("present", "words"), [(None, "no tokenizer"), ("tokenizer.model", "only tokenizer.model")])
def test_no_tokenizer(model_dir, refused, present, words):
    directory = model_dir()
    (directory / "tokenizer.json").unlink()
    if present:
        (directory / present).write_bytes(b"\n")
    refused(directory, InvalidInputError, words, "tokenizer.json is needed", "save_pretrained")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"model": {"type": "Odd"}}'])
def test_malformed_tokenizer(model_dir, refused, text):
    directory = model_dir()
    (directory / "tokenizer.json").write_text(text)
    refused(directory, InvalidInputError, "tokenizer.json cannot be loaded")


def test_token_without_a_row(model_dir, refused):
    directory = model_dir()
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 320
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(directory, InvalidInputError, "token id 320", "320 embedding rows")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}', "auto_map"),
        ("special_tokens_map.json", "[]", "object"),
        ("generation_config.json", '{"a": NaN}', "NaN"),
    ],
)
def test_malformed_side_file(model_dir, refused, name, text, words):
    directory = model_dir()
    (directory / name).write_text(text)
    refused(directory, InvalidInputError, name, words)


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        (
            "llama",
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            ("1 tensors", "model.layers.1.mlp.up_proj.weight"),
        ),
        ("llama", lambda t: t.update({"model.norm.weight": torch.ones(7)}), ("model.norm.weight", "[7]", "[144]")),
        (
            "llama",
            lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(96, 144)}),
            ("down_proj", "[96, 144]", "[144, 96]"),
        ),
        ("llama", lambda t: t.update({"model.layers.0.mlp.extra.weight": torch.ones(3)}), ("extra", "[3]", "not part")),
        ("llama", lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(96, 144)}), ("layers.3",)),
        ("llama", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(144)}), ("q_proj.bias",)),
        ("qwen2", lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"), ("k_proj.bias", "missing")),
        ("mistral", lambda t: t.pop("lm_head.weight"), ("lm_head.weight", "missing")),
    ],
)
def test_tensors_that_differ_from_the_config(model_dir, refused, family, change, words):
    directory = model_dir(family)
    change_tensors(directory, change)
    refused(directory, InvalidInputError, *words)


def test_old_rope_buffers_are_ignored(model_dir):
    directory = model_dir()
    change_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert len(open_checkpoint(directory).weights()) == 29


def test_source_hash_tells_checkpoints_apart(model_dir):
    directory = model_dir()
    first = open_checkpoint(directory).source_hash
    assert first == open_checkpoint(directory).source_hash
    assert len(first) == 64
    change_tensors(directory, lambda t: t["model.norm.weight"].mul_(1.01))
    assert open_checkpoint(directory).source_hash != first


def test_content_hash_sees_every_byte(model_dir):
    """A merge of two models may differ in the middle of a file alone."""
    directory = model_dir(intermediate_size=4096)
    before = open_checkpoint(directory)
    first = before.content_hash()
    assert first == open_checkpoint(directory).content_hash()
    with (directory / "model.safetensors").open("r+b") as file:
        file.seek((directory / "model.safetensors").stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    after = open_checkpoint(directory)
    assert after.source_hash == before.source_hash, "it was made to be quick"
    assert after.content_hash() != first


def test_folder_that_cannot_be_listed(model_dir, refused, monkeypatch):
    directory = model_dir()

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(directory), "iterdir", denied)
    with pytest.raises(InvalidInputError, match="cannot be read: Permission denied"):
        open_checkpoint(directory)


def test_hub_id_offline(tmp_path, monkeypatch, refused):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused("some-organisation/no-such-model", InvalidInputError, "some-organisation/no-such-model", "go online")


def test_hub_id_online(model_dir, tmp_path, monkeypatch):
    """Only data files are asked for, and the snapshot is checked like any folder."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    directory = model_dir()
    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(directory)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").directory == directory
    assert asked == [("org/name", ["*.safetensors", "*.json", "*.jinja", "*.txt"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", True),
        ("org/name-1.5_b", True),
        ("model/x", False),
        ("name", False),
        ("a/b/c", False),
        ("../x", False),
    ],
)
def test_what_a_hub_id_is(model_dir, monkeypatch, text, expected):
    """A folder of the first name means that a local path was meant: no network."""
    monkeypatch.chdir(model_dir().parent)
    assert hub.is_hub_id(text) == expected


def test_a_bad_folder_is_refused_without_torch(tmp_path):
    """Errors come at once, and the check works where torch is not installed."""
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    code = (
        "import sys; from bdq_export.checkpoint import open_checkpoint\n"
        "try: open_checkpoint(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__)\n"
        "print(*({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [UnsupportedModelError.__name__]
