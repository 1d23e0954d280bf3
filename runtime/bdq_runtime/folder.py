"""The folder an exported model lives in: where the graph is and what its side files say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class ModelFolder:
    """An ONNX file and its folder.

    Attributes:
        model: the `.onnx` file.
    """

    model: Path

    @classmethod
    def of(cls, path: str | Path) -> ModelFolder:
        """The folder of `path`, an `.onnx` file or a folder holding `model.onnx`.

        Raises:
            FileNotFoundError: there is no such file, or no `model.onnx` in the folder.
        """
        found = Path(path)
        if not found.exists():
            raise FileNotFoundError(f"model {found} does not exist; give an .onnx file or a folder with {MODEL_FILE}")
        if found.is_dir():
            found = found / MODEL_FILE
            if not found.is_file():
                others = ", ".join(sorted(p.name for p in found.parent.glob("*.onnx"))) or "no .onnx file"
                raise FileNotFoundError(f"{found.parent} has no {MODEL_FILE} (found {others}); name the .onnx file")
        return cls(found)

    @property
    def directory(self) -> Path:
        """The folder that holds the model and its side files."""
        return self.model.parent

    @cached_property
    def genai(self) -> Mapping[str, Any]:
        """The `model` part of genai_config.json, empty where there is none."""
        part = self.read_json("genai_config.json").get("model", {})
        return part if isinstance(part, dict) else {}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, empty where there is none; of a nested configuration, its text part."""
        config = self.read_json("config.json")
        text = config.get("text_config")
        return text if isinstance(text, dict) else config

    def read_json(self, name: str) -> dict[str, Any]:
        """The object in the side file `name`; empty where the file is missing.

        Raises:
            ValueError: the file is not a JSON object.
        """
        path = self.directory / name
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}; restore it from the export") from None
        if not isinstance(value, dict):
            raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
        return value

    def eos_ids(self) -> frozenset[int]:
        """Token ids that end a text: of generation_config.json, else genai_config.json, else config.json."""
        for source in (self.read_json("generation_config.json"), self.genai, self.config):
            value = source.get("eos_token_id")
            if value is not None:
                return frozenset(int(v) for v in (value if isinstance(value, list) else [value]))
        return frozenset()

    def head_size(self) -> int | None:
        """Channels of one attention head, where a side file says it."""
        size = self.genai.get("decoder", {}).get("head_size") or self.config.get("head_dim")
        if not size and self.config.get("hidden_size") and self.config.get("num_attention_heads"):
            size = self.config["hidden_size"] // self.config["num_attention_heads"]
        return int(size) if size else None

    def context_length(self) -> int | None:
        """The most positions the model was made for, where a side file says it."""
        length = self.genai.get("context_length") or self.config.get("max_position_embeddings")
        return int(length) if length else None
