"""A launch of the library, compiled by Triton for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linfusion.kernels.launch import Launch


def compile_for(
    launch: Launch,
    vendor: str,
    arch: int | str,
    warp: int,
    aligned: Callable[[str], bool] = lambda name: True,
) -> Any:
    """What `triton.compile` makes of it, integers not specialised on.

    Args:
        launch: the kernel with its arguments.
        vendor, arch, warp: "cuda", 80, 32; "hip", "gfx942", 64.
        aligned: whether the tensor of a parameter starts at a multiple of 16 bytes.
    """
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
    types |= {torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, launch.args[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            if aligned(name):
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(vendor, arch, warp),
        options=launch.options,
    )
