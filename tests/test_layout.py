"""The project's shape: which package may import which, how long a file may be, which names a wheel brings."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "bdq_export": ROOT / "bdq_export",
    "bdq_passes": ROOT / "passes" / "bdq_passes",
    "bdq_runtime": ROOT / "runtime" / "bdq_runtime",
    "bdq_models": ROOT / "models" / "bdq_models",
}
ALLOWED = {
    "bdq_models": set[str](),
    "bdq_runtime": {"numpy", "onnxruntime", "tokenizers", "jinja2"},
    "bdq_passes": {"numpy", "onnx_ir", "onnxscript", "bdq_runtime"},
}
MAX_LINES = 400


def _modules(package: str) -> list[Path]:
    return sorted(PACKAGES[package].rglob("*.py"))


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_leaf_packages_import_only_what_their_layer_may(package: str) -> None:
    for path in _modules(package):
        allowed = ALLOWED[package] | {package} | sys.stdlib_module_names
        if path.name == "onnx_operators.py":  # for onnx's own evaluator; no module imports it
            allowed |= {"onnx"}
        builds_images = path.is_relative_to(PACKAGES["bdq_runtime"] / "gpu")
        if builds_images:
            allowed |= {"triton"}
        for name in _imports(path):
            assert name != "bdq_runtime.reference.onnx_operators", f"{path.name} imports {name}"
            compiles = name.startswith(("bdq_runtime.gpu.kernels", "bdq_runtime.gpu.compiler", "bdq_runtime.gpu.build"))
            assert builds_images or not compiles, f"{path.name} imports {name}"
            assert name.partition(".")[0] in allowed, f"{path.name} imports {name}"


def test_passes_use_only_the_tables_and_layouts_of_the_runtime() -> None:
    allowed = {f"bdq_runtime.{module}" for module in ("opset", "packing", "panels", "specs")}
    for path in _modules("bdq_passes"):
        for name in _imports(path):
            assert not name.startswith("bdq_runtime") or name in allowed, f"{path.name}: {name}"


def test_no_model_family_is_named_outside_models() -> None:
    families = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3", "gemma3_text"}
    allowed_files = {"genai_config.py"}
    for package in ("bdq_export", "bdq_passes", "bdq_runtime"):
        for path in _modules(package):
            if path.name in allowed_files or "gguf" in str(path.relative_to(PACKAGES[package])):
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Compare):
                    for part in [node.left, *node.comparators]:
                        assert not (isinstance(part, ast.Constant) and part.value in families), (
                            f"{path}:{node.lineno} branches on a model family"
                        )


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_files_stay_short_and_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").exists()
    for path in _modules(package):
        lines = len(path.read_text().splitlines())
        assert lines <= MAX_LINES, f"{path} has {lines} lines, the limit is {MAX_LINES}"


@pytest.mark.parametrize("folder", ["passes", "runtime", "models", "tests"])
def test_generic_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from bdq_export.cli import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)


def test_public_functions_are_not_shadowed_by_modules() -> None:
    code = (
        "import bdq_export.commands.export, bdq_export.commands.bench\n"
        "from bdq_export import bench, evaluate, export, fetch, inspect, run\n"
        "assert all(callable(f) for f in (bench, evaluate, export, fetch, inspect, run))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
