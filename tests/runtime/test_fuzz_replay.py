"""The fuzz targets on seeded inputs: under the sanitizers here, and for NEON in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "runtime"
TARGETS = ("linear", "attention")


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++") or not shutil.which("cmake"), reason="needs g++ and CMake")
def test_under_the_sanitizers(tmp_path: Path) -> None:
    # The kernels need no header of ONNX Runtime; the folder only keeps CMake from fetching them.
    options = ("-DBDQ_FUZZ=ON", "-DBDQ_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_COMPILER=g++")
    run("cmake", "-S", RUNTIME, "-B", tmp_path, f"-DORT_INCLUDE_DIR={tmp_path}", *options)
    run("cmake", "--build", tmp_path, "--parallel", "2", "--target", *(f"fuzz_{name}" for name in TARGETS))
    for name in TARGETS:
        assert run(tmp_path / "fuzz" / f"fuzz_{name}", 1500).endswith("1500 inputs\n")


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"),
    reason="needs g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_equals_the_plain_kernels(tmp_path: Path) -> None:
    kernels = sorted((RUNTIME / "csrc" / "kernels").rglob("*.cc"))
    flags = ("-O2", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-static", f"-I{RUNTIME}/csrc/kernels")
    run("aarch64-linux-gnu-g++", *flags, "-r", "-nostdlib", "-o", tmp_path / "kernels.o", *kernels)
    for name in TARGETS:
        sources = (RUNTIME / "fuzz" / f"fuzz_{name}.cc", RUNTIME / "fuzz" / "standalone.cc", tmp_path / "kernels.o")
        run("aarch64-linux-gnu-g++", *flags, "-o", tmp_path / name, *sources)
        assert run("qemu-aarch64", tmp_path / name, 3000).endswith("3000 inputs\n")
