"""The CUDA half of the library: Triton sources, their compiled images and the test of a GPU (docs/gpu.md).

`kernels/` and `build.py` need Triton and serve building and tests only; nothing that runs a model imports them.
"""
