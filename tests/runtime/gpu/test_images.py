"""The committed GPU images: they are what the sources give, and within their budgets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from importlib.resources import files
from typing import Any

import pytest

from bdq_runtime.gpu.archive import ARCHIVE, Entry, pack, read_archive, read_manifest, sources_digest, unpack
from bdq_runtime.gpu.variants import IMAGES, TARGETS

KIB = 1024
SHARED = {80: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Shared memory of a block; sm_80 is also for 8.6, which has less than 8.0."""
REGISTERS = 64 * KIB
"""Of a multiprocessor: a block needs them all at once."""
TENSOR = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "UTCIMMA", 120: "IMMA"}
FLOAT_TENSOR = {"HMMA", "HGMMA", "UTCHMMA"}
STACK = {"low_bit_gemm": 64, "cached_attention": 640}
"""Bytes of a thread that may spill; 0 for other kernels."""
LARGEST_ARCHIVE = 1 << 20


def _reports() -> list[tuple[str, int, dict[str, Any]]]:
    images = read_manifest()["images"]
    return [
        (name, int(target.removeprefix("sm_")), report)
        for name, image in images.items()
        for target, report in image["resources"].items()
    ]


def test_the_manifest_describes_the_archive() -> None:
    manifest, entries = read_manifest(), read_archive()
    archive = files("bdq_runtime.gpu").joinpath("images", ARCHIVE).read_bytes()
    assert hashlib.sha256(archive).hexdigest() == manifest["archive"]
    found: dict[str, dict[str, str]] = {}
    for entry in entries:
        target = f"sm_{entry.target}" if entry.target else "ptx"
        found.setdefault(entry.name, {})[target] = hashlib.sha256(entry.code).hexdigest()
    assert found == {name: image["sha256"] for name, image in manifest["images"].items()}
    assert len(archive) <= LARGEST_ARCHIVE


def test_images_were_built_from_these_sources() -> None:
    """When this fails: `python -m bdq_runtime.gpu.build`, and commit what it wrote."""
    manifest = read_manifest()
    assert manifest["sources"] == sources_digest()
    assert set(manifest["images"]) == set(IMAGES)
    for name, image in IMAGES.items():
        recorded = manifest["images"][name]
        assert recorded["constants"] == dict(image.constants)
        assert recorded["arguments"] == [kind for kind, _ in image.arguments]
        assert (recorded["kernel"], recorded["warps"], recorded["stages"]) == (image.kernel, image.warps, image.stages)
        assert set(recorded["sha256"]) == {"ptx", *(f"sm_{target}" for target in TARGETS)}


def test_a_launch_fits_every_gpu_that_gets_the_image() -> None:
    for entry in read_archive():
        if entry.target:
            assert entry.shared <= SHARED[entry.target], (entry.name, entry.target, entry.shared)
    threads = {(entry.name, entry.target): entry.threads for entry in read_archive()}
    for name, target, report in _reports():
        assert report["registers"] * threads[name, target] <= REGISTERS, (name, target, report)


def test_little_spills() -> None:
    for name, target, report in _reports():
        kernel = IMAGES[name].kernel.partition(".")[2]
        assert report["stack"] <= STACK.get(kernel, 0), (name, target, report)


def test_matmuls_are_on_tensor_cores() -> None:
    for name, target, report in _reports():
        kernel = IMAGES[name].kernel.partition(".")[2]
        found = set(report["instructions"])
        if kernel == "low_bit_gemm":
            assert TENSOR[target] in found, (name, target, report)
        elif kernel == "low_bit_gemv":
            assert "IDP" in found, (name, target, report)  # four products of bytes at once
        elif kernel in ("float_gemm", "cached_attention"):
            assert found & FLOAT_TENSOR, (name, target, report)


def test_ptx_has_no_contraction_and_no_flush_to_zero() -> None:
    """Exact lines need separate multiplications and additions, and subnormals."""
    for entry in read_archive():
        if entry.target == 0:
            assert b"fma.rn" not in entry.code, entry.name
            assert b".ftz" not in entry.code, entry.name


def test_packing_an_archive_can_be_undone() -> None:
    entries = [Entry("a", 80, b"\x7fELF123", 10, 128), Entry("a", 0, b".version 8.0", 10, 128)]
    assert unpack(pack(entries)) == entries
    assert pack(entries) == pack(entries)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "target"),
    [("bdq_low_bit_gemm_bits4_bn64_bm16_blocked0", 90), ("bdq_quantize_rows_block1024", 100)],
)
def test_compiling_again_gives_the_same_bytes(name: str, target: int) -> None:
    triton = pytest.importorskip("triton", reason="Triton is not installed (pip install 'bdq-export[gpu-build]')")
    manifest = read_manifest()
    if triton.__version__ != manifest["triton"]:
        pytest.skip(f"Triton is {triton.__version__}, the images are of {manifest['triton']}")
    code = (
        "import dataclasses, hashlib, json, sys, tempfile, os\n"
        "os.environ['TRITON_CACHE_DIR'] = tempfile.mkdtemp()\n"
        "from bdq_runtime.gpu.compiler import compile_image\n"
        "from bdq_runtime.gpu.inspection import resources\n"
        "from bdq_runtime.gpu.variants import IMAGES\n"
        "made = compile_image(IMAGES[sys.argv[1]], int(sys.argv[2]))\n"
        "report = dataclasses.asdict(resources(made.cubin))\n"
        "print(json.dumps([hashlib.sha256(made.cubin).hexdigest(), report]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(target)], check=True, capture_output=True, text=True, env=environment
    )
    digest, report = json.loads(done.stdout)
    recorded = manifest["images"][name]
    assert digest == recorded["sha256"][f"sm_{target}"]
    assert report == recorded["resources"][f"sm_{target}"]
