"""Float graphs by `mobius-onnx`, which constructs a decoder from config.json without weights and without tracing.

The only module that knows mobius. It is a 0.1 release and pinned; every graph is checked against torch.
"""

from __future__ import annotations

import ast
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from bdq_export.builders.graph import set_scope
from bdq_export.errors import MissingDependencyError, UnsupportedModelError
from bdq_models import Architecture


def construct(config: Mapping[str, Any], architecture: Architecture, tied: bool) -> ir.Model:
    """The decoder of `config` with parameters that have names and shapes but no values.

    Args:
        config: the parsed config.json.
        architecture: its family.
        tied: whether lm_head reads the embedding's weight, whatever the config says.

    Raises:
        MissingDependencyError: mobius-onnx is not installed.
        UnsupportedModelError: mobius cannot build this config.
    """
    try:
        import mobius
    except ImportError as error:
        raise MissingDependencyError(
            "mobius-onnx is not installed; install it with: pip install 'bdq-export[export]'"
        ) from error
    values = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    values |= {"architectures": [architecture.classes[0]], "model_type": architecture.name}
    values |= {"tie_word_embeddings": tied}
    with tempfile.TemporaryDirectory(prefix="bdq-config-") as folder:
        Path(folder, "config.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            package = mobius.build(folder, dtype="f32", load_weights=False, execution_provider="cpu")
        except (ValueError, KeyError, AttributeError, TypeError, NotImplementedError, OSError) as error:
            detail = " ".join(str(error).replace(f"{folder}{os.sep}", "").split())
            raise UnsupportedModelError(f"mobius-onnx cannot build this {architecture.name} model: {detail}") from error
    model: ir.Model = package["model"]
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.onnxscript.name_scopes", "[]"))
        set_scope(node, ".".join(scope for scope in scopes if scope))
    return model
