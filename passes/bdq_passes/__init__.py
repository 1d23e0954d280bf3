"""Graph passes: from a float ONNX graph to one whose weights stay in low bits."""

from __future__ import annotations
