"""Arrays on the disk: the same values in the same layout, in files without a name, freed with their last view."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from bdq_export import scratch as module
from bdq_export.errors import InvalidInputError
from bdq_export.scratch import Scratch, is_mapped


def open_files(folder):
    """Files of `folder` without a name that this process has open or mapped."""
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.int64])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 4), (0, 4)])
def test_same_values(tmp_path, dtype, shape):
    array = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    kept = Scratch(tmp_path).keep(array)
    assert kept.dtype == dtype
    assert np.array_equal(kept, array)
    assert is_mapped(kept) == (array.size > 0)
    assert not is_mapped(array)
    assert not list(tmp_path.iterdir())


def test_order_of_axes_is_kept(tmp_path):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for view, contiguous in ((array.T, "F"), (array[:, ::2], "C")):
        kept = Scratch(tmp_path).keep(view)
        assert np.array_equal(kept, view)
        assert kept.flags[f"{contiguous}_CONTIGUOUS"]


def test_views_of_what_is_kept_are_not_written_again(tmp_path):
    scratch = Scratch(tmp_path)
    kept = scratch.keep(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert scratch.keep(kept[::2].T) is not kept
    assert np.shares_memory(scratch.keep(kept[::2].T), kept)


def test_arrays_do_not_overlap_across_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REGION", 1000)
    scratch = Scratch(tmp_path)
    arrays = [np.full(size, index, np.uint8) for index, size in enumerate((300, 300, 300, 300, 5000, 10, 990))]
    kept = [scratch.keep(array) for array in arrays]
    assert all(np.array_equal(one, other) for one, other in zip(kept, arrays, strict=True))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux")
def test_files_go_with_their_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_REGION", 4096)
    before = len(os.listdir("/proc/self/fd"))
    scratch = Scratch(tmp_path)
    kept = [scratch.keep(np.zeros(4096, np.uint8)) for _ in range(8)]
    assert open_files(tmp_path) == 8
    del kept[:-1]
    gc.collect()
    assert open_files(tmp_path) == 1
    del kept, scratch
    gc.collect()
    assert open_files(tmp_path) == 0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_disk_is_an_error_not_a_signal(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            Scratch(tmp_path).keep(np.zeros(10))


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InvalidInputError, match="cannot be written to"):
        Scratch(tmp_path).keep(np.zeros(10))
