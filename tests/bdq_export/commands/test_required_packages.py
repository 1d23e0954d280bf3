"""What exporting imports late is asked for first: a package that is missing must not end an export half way."""

from __future__ import annotations

import importlib.util

import pytest

from bdq_export.commands.export import require_packages
from bdq_export.errors import MissingDependencyError


def test_nothing_is_missing_here():
    require_packages()


@pytest.mark.parametrize("package", ["torch", "onnxscript", "numba"])
def test_a_missing_package_is_named(package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(MissingDependencyError, match=f"exporting needs {package}, not installed here; run: pip"):
        require_packages()
