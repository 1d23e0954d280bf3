"""Graph passes: from a float ONNX graph to one whose weights stay in low bits.

This file must not `from __future__ import annotations`: the name would hide the module of that name.
"""
