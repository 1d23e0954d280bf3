"""The tiny decoder of tests/runtime, for the commands that run one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_FILE = Path(__file__).parents[2] / "runtime" / "conftest.py"
_SPEC = importlib.util.spec_from_file_location("tiny_decoder_conftest", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)
tiny_decoder = _MODULE.tiny_decoder
