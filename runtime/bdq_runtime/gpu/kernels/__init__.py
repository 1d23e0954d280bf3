"""Triton sources of the `bdq` operators. They read the layouts of docs/ops.md in place.

Lines that docs/ops.md calls exact stay exact here: images are compiled without contraction to fused multiply-adds, and
divisions that matter are `div_rn`.
"""
