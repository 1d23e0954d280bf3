"""One image for one target, compiled by Triton without a GPU."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

from bdq_runtime.gpu.variants import Image


@dataclass(frozen=True)
class Compiled:
    """Machine code of one image.

    Attributes:
        name: of the image.
        target: compute capability, as in `variants.TARGETS`.
        cubin: for that capability.
        ptx: for it and every newer one.
        shared: bytes of dynamic shared memory that a launch asks for.
        threads: in a program.
    """

    name: str
    target: int
    cubin: bytes
    ptx: bytes
    shared: int
    threads: int


def compile_image(image: Image, target: int) -> Compiled:
    """Compile; the same bytes on every machine with the same Triton.

    Raises:
        RuntimeError: Triton runs kernels in its interpreter in this process, or wants memory that launches do not give.
    """
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a third of the size, and no paths in it
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set; unset it to compile")
    module, _, name = image.kernel.partition(".")
    function: Any = getattr(importlib.import_module(f"bdq_runtime.gpu.kernels.{module}"), name)
    names = function.arg_names
    arguments = dict(zip((n for n in names if n not in image.constants), image.arguments, strict=True))
    source = ASTSource(
        function,
        signature={n: arguments[n][0] if n in arguments else "constexpr" for n in names},
        constexprs={(names.index(key),): value for key, value in image.constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", alignment]]
            for n, (_, alignment) in arguments.items()
            if alignment > 1
        },
    )
    options = {"num_warps": image.warps, "num_stages": image.stages, "enable_fp_fusion": False}
    made = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    metadata = made.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or metadata.name != image.name:
        raise RuntimeError(f"{image.name} for sm_{target} wants scratch memory or another entry: {metadata}")
    ptx = made.asm["ptx"].encode()
    return Compiled(image.name, target, made.asm["cubin"], ptx, metadata.shared, 32 * metadata.num_warps)
