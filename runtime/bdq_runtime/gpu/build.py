"""Compile every image for every target: `python -m bdq_runtime.gpu.build [FOLDER]`. Needs Triton, and no GPU."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bdq_runtime.gpu.archive import ARCHIVE, MANIFEST, Entry, manifest, pack
from bdq_runtime.gpu.compiler import Compiled, compile_image
from bdq_runtime.gpu.inspection import Resources, resources
from bdq_runtime.gpu.variants import IMAGES, TARGETS, Image


def build(folder: Path, workers: int) -> None:
    """Write the archive and its manifest to `folder`; the same bytes whenever sources and Triton are the same."""
    import triton

    jobs = [(image, target) for target in TARGETS for image in IMAGES.values()]
    compiled: list[Compiled] = []
    reports: dict[str, dict[str, Resources]] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for made, report in pool.map(_job, *zip(*jobs, strict=True)):
                print(f"sm_{made.target} {made.name}: {len(made.cubin)} bytes, {report}", flush=True)
                compiled.append(made)
                reports.setdefault(made.name, {})[f"sm_{made.target}"] = report
    entries = [Entry(c.name, c.target, c.cubin, c.shared, c.threads) for c in compiled]
    entries += [Entry(c.name, 0, c.ptx, c.shared, c.threads) for c in compiled if c.target == TARGETS[0]]
    archive = pack(entries)
    details = {
        name: {
            "kernel": image.kernel,
            "constants": dict(image.constants),
            "arguments": [kind for kind, _ in image.arguments],
            "warps": image.warps,
            "stages": image.stages,
            "resources": {target: dataclasses.asdict(report) for target, report in reports[name].items()},
        }
        for name, image in IMAGES.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ARCHIVE).write_bytes(archive)
    (folder / MANIFEST).write_text(manifest(entries, archive, triton.__version__, details))
    print(f"{len(entries)} images, {sum(len(e.code) for e in entries)} bytes, {len(archive)} in {folder / ARCHIVE}")


def _job(image: Image, target: int) -> tuple[Compiled, Resources]:
    made = compile_image(image, target)
    return made, resources(made.cubin)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bdq_runtime.gpu.build", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    chosen = parser.parse_args(arguments)
    build(chosen.folder, chosen.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
