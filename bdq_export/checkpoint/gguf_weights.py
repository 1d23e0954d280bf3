"""The weights of a GGUF file as a float32 safetensors file, a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bdq_export.checkpoint.gguf_file import GgufFile, GgufTensor
from bdq_export.errors import InvalidInputError
from bdq_models.gguf_families import GgufFamily

_CHUNK_VALUES = 1 << 22
_TOP_LEVEL = ("token_embd", "output_norm", "output")


def checkpoint_names(gguf: GgufFile, family: GgufFamily) -> dict[str, str]:
    """Checkpoint name -> name in the GGUF file, in checkpoint order.

    Raises:
        InvalidInputError: a tensor that the family does not have.
    """
    architecture = family.architecture
    modules = dict(
        zip(_TOP_LEVEL, (architecture.embedding, architecture.final_norm, architecture.lm_head), strict=True)
    )
    blocks = dict(family.names)
    names = {}
    for name in gguf.tensors:
        module, _, kind = name.rpartition(".")
        _, _, inner = module.partition(".")
        index, _, inner = inner.partition(".")
        if module in modules:
            names[f"{modules[module]}.{kind}"] = name
        elif module.startswith("blk.") and index.isdecimal() and inner in blocks:
            names[f"{architecture.layers}.{int(index)}.{blocks[inner]}.{kind}"] = name
        else:
            raise InvalidInputError(
                f"{gguf.path.name} has the tensor {name[:80]!r}, which is not understood for this family "
                "(scaled RoPE and mixtures of experts are not); give the original safetensors folder"
            )
    return dict(sorted(names.items()))


def write_safetensors(gguf: GgufFile, family: GgufFamily, heads: Mapping[str, int], path: Path) -> None:
    """Dequantize all tensors into the safetensors file `path`, float32; memory stays at a few rows.

    Args:
        gguf: the source.
        family: how it is stored.
        heads: GGUF module name of each permuted linear -> its number of heads.
        path: new file.

    Raises:
        InvalidInputError: an unknown tensor or type, or data beyond the end of the file.
    """
    names = checkpoint_names(gguf, family)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, source in names.items():
        shape = gguf.tensors[source].shape
        size = 4 * int(np.prod(shape, dtype=object))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(8 + len(raw)) % 64)  # data starts aligned, so that mapped tensors are
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for source in names.values():
            for chunk in _float_rows(gguf, source, family, heads):
                file.write(np.ascontiguousarray(chunk, dtype="<f4").data)


def _float_rows(
    gguf: GgufFile, name: str, family: GgufFamily, heads: Mapping[str, int]
) -> Iterator[NDArray[np.float32]]:
    """The tensor `name` as chunks of rows [n, K] (a vector is one row), in the order of the checkpoint."""
    from gguf import GGMLQuantizationType, dequantize

    tensor = gguf.tensors[name]
    rows = _stored_rows(gguf, name, tensor)
    module = name.split(".")[-2]
    if module in family.permuted:
        rows = rows[_head_order(rows.shape[0], heads[module], name)]
    offset = np.float32(family.norm_offset if module.endswith("_norm") else 0.0)
    step = max(1, _CHUNK_VALUES // tensor.shape[-1])
    for start in range(0, rows.shape[0], step):
        try:
            chunk = dequantize(rows[start : start + step], GGMLQuantizationType(tensor.kind))
        except NotImplementedError:
            kind = GGMLQuantizationType(tensor.kind).name
            raise InvalidInputError(
                f"{gguf.path.name}: tensor {name} has type {kind}, which is not supported"
            ) from None
        yield chunk - offset if offset else chunk


def _stored_rows(gguf: GgufFile, name: str, tensor: GgufTensor) -> NDArray[np.uint8]:
    """The bytes of a tensor as [rows, bytes of a row], mapped from the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError):
        raise InvalidInputError(f"{gguf.path.name}: tensor {name} has unknown type {tensor.kind}") from None
    columns = tensor.shape[-1]
    count = int(np.prod(tensor.shape[:-1], dtype=object))
    if columns % block or not columns or not count:
        raise InvalidInputError(
            f"{gguf.path.name}: tensor {name} has shape {list(tensor.shape)}, no multiple of {block}"
        )
    row_bytes = columns // block * block_bytes
    start = gguf.data_start + tensor.offset
    if start + count * row_bytes > gguf.path.stat().st_size:
        raise InvalidInputError(
            f"{gguf.path.name}: tensor {name} ends beyond the file; it is truncated, download it again"
        )
    return np.memmap(gguf.path, mode="r", dtype=np.uint8, offset=start, shape=(count, row_bytes))


def _head_order(rows: int, heads: int, name: str) -> NDArray[np.intp]:
    """Row order that undoes llama.cpp's interleaving: within a head it stores channels i and i + d/2 side by side."""
    if rows % (2 * heads):
        raise InvalidInputError(f"tensor {name} has {rows} rows; expected a multiple of 2 x {heads} heads")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
