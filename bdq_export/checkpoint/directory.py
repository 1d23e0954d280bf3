"""A model folder, opened after everything in it was checked; weights are read when asked for.

path -> folder (hub id: download, .gguf: convert) -> config -> weight headers -> tensor shapes -> tokenizer
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bdq_export.checkpoint.config_file import MAX_CONFIG_BYTES, read_config, resolve_model
from bdq_export.checkpoint.containment import regular_file
from bdq_export.checkpoint.expected import check_tensors, expected_shapes
from bdq_export.checkpoint.hub import download, is_hub_id
from bdq_export.checkpoint.index import weight_files
from bdq_export.checkpoint.json_file import read_json_object
from bdq_export.checkpoint.safetensors_header import TensorEntry
from bdq_export.checkpoint.tokenizer_files import find_tokenizer_files
from bdq_export.errors import InvalidInputError
from bdq_models import Architecture, Dimensions

if TYPE_CHECKING:
    from torch import Tensor

    from bdq_export.lazy_weights import LazyWeights
    from bdq_export.scratch import Scratch

_HASHED_ENDS = 1 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checked model folder.

    Attributes:
        directory: the folder.
        config: config.json without the keys that choose code to run.
        generation_config: generation_config.json, {} if there is none.
        architecture: the family.
        dimensions: the sizes.
        tokenizer_files: tokenizer.json and what goes with it.
        source_hash: SHA-256 over name, size, header and first and last MiB of each weight file and over
            config.json. It names checkpoints in reports; one that differs in the middle of a file only has the same
            (see `content_hash`).
        files: each weight file with its tensors as stored, in name order.
    """

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    architecture: Architecture
    dimensions: Dimensions
    tokenizer_files: tuple[Path, ...]
    source_hash: str
    files: dict[Path, dict[str, TensorEntry]] = field(repr=False)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the tensors as stored, sorted."""
        return tuple(sorted(name for entries in self.files.values() for name in entries))

    @property
    def parameters(self) -> int:
        """Number of values in the stored tensors."""
        return sum(self.stored_bytes(itemsize=1).values())

    def content_hash(self) -> str:
        """SHA-256 over config.json and every byte of the weight files.

        Reads all of them: under a second for 135M parameters, minutes for 140 GB. So only what goes on from earlier
        work asks for it, where `source_hash` would let two merges that differ in a few layers pass as one model.
        """
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        for path in self.files:
            with path.open("rb") as file:
                digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\0".encode())
        return digest.hexdigest()

    def stored_bytes(self, itemsize: int) -> dict[str, int]:
        """Tensor name -> bytes it takes at `itemsize` bytes a value."""
        sizes = {}
        for entries in self.files.values():
            for name, entry in entries.items():
                count = itemsize
                for size in entry.shape:
                    count *= size
                sizes[name] = count
        return sizes

    def tensor(self, name: str) -> Tensor:
        """The tensor `name` as stored (dtype and shape), mapped from the file, not copied.

        Raises:
            LookupError: there is no such tensor.
        """
        from bdq_export.checkpoint.weights import read_tensor

        for path, entries in self.files.items():
            if name in entries:
                return read_tensor(path, name)
        raise LookupError(f"{self.directory} has no tensor {name!r}")

    def weights(self) -> dict[str, Tensor]:
        """Canonical float32 weights, checked to be finite.

        Names are those of the checkpoint, with packed linears split into their logical parts and without
        lm_head when it is tied. A tensor stored as float32 is a read-only-in-effect view of the file: treat it as
        constant.

        Raises:
            InvalidInputError: NaN or infinity, or a tied lm_head that differs from the embedding.
        """
        from bdq_export.checkpoint.weights import load_weights

        return load_weights(self)

    def lazy_weights(self, scratch: Scratch) -> LazyWeights:
        """The same weights, converted each time they are read; embedding, final norm and lm_head are kept.

        All of them are checked once here, tensor by tensor.

        Args:
            scratch: where what is made of them is put instead of into memory.

        Raises:
            InvalidInputError: as `weights`.
        """
        from bdq_export.checkpoint.weights import MappedWeights

        return MappedWeights(self, scratch)


def open_checkpoint(path: Path | str, work_dir: Path | None = None) -> Checkpoint:
    """Open a model folder, a Hugging Face hub id or a `.gguf` file. Reads no weights yet.

    Args:
        path: what the user gave.
        work_dir: where a `.gguf` is converted to; needed for one.

    Raises:
        UnsupportedModelError: a kind of model that cannot be exported.
        InvalidInputError: anything missing, malformed, inconsistent or unsafe.
    """
    return _open_directory(_locate(path, work_dir))


def _locate(path: Path | str, work_dir: Path | None) -> Path:
    """The local folder for what the user gave."""
    local = Path(path)
    if is_hub_id(local.as_posix()) and not local.exists():
        return download(local.as_posix())
    if local.is_symlink() and not local.exists():
        raise InvalidInputError(f"{local} is a dangling symlink; expected a model folder")
    if not local.exists():
        raise InvalidInputError(f"{local} does not exist; expected a model folder, a hub id or a .gguf file")
    if local.suffix == ".gguf":
        return _converted(local, work_dir)
    if not local.is_dir():
        raise InvalidInputError(f"{local} is a file; expected a model folder or a .gguf file")
    return local


def _converted(gguf: Path, work_dir: Path | None) -> Path:
    from bdq_export.checkpoint.gguf import convert_once

    if work_dir is None:
        raise InvalidInputError(f"{gguf} must be converted first, which needs a work folder: `bdq fetch` or export it")
    return convert_once(gguf, work_dir)


def _open_directory(directory: Path) -> Checkpoint:
    try:
        names = {entry.name for entry in directory.iterdir()}
    except OSError as error:
        raise InvalidInputError(f"{directory} cannot be read: {error.strerror}") from None
    if not names:
        raise InvalidInputError(f"{directory} is empty; expected config.json, *.safetensors and tokenizer.json")
    if "config.json" not in names:
        weight_files(directory)  # an adapter or a pickle is the more telling reason
        raise InvalidInputError(f"{directory} has no config.json; expected a Hugging Face model folder")
    config = read_config(regular_file(directory, "config.json"))
    architecture, dimensions = resolve_model(config)
    files = weight_files(directory)
    found = {name: entry.shape for entries in files.values() for name, entry in entries.items()}
    check_tensors(expected_shapes(architecture, dimensions, config), found, architecture.lm_head)
    return Checkpoint(
        directory=directory,
        config=config,
        generation_config=_generation_config(directory, names),
        architecture=architecture,
        dimensions=dimensions,
        tokenizer_files=find_tokenizer_files(directory, dimensions.vocab_size),
        source_hash=_source_hash(directory / "config.json", files),
        files=files,
    )


def _generation_config(directory: Path, names: set[str]) -> dict[str, Any]:
    if "generation_config.json" not in names:
        return {}
    path = regular_file(directory, "generation_config.json")
    return read_json_object(path, path.name, MAX_CONFIG_BYTES)


def _source_hash(config: Path, files: dict[Path, dict[str, TensorEntry]]) -> str:
    digest = hashlib.sha256(config.read_bytes())
    for path, entries in files.items():
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0{sorted(entries.items())}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_HASHED_ENDS))
            file.seek(max(0, size - _HASHED_ENDS))
            digest.update(file.read(_HASHED_ENDS))
    return digest.hexdigest()
