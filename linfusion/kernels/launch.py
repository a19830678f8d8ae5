"""What launching a Triton kernel takes: for what GPU, with which strides, and the call itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

DOT = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Launch(NamedTuple):
    """One call of a kernel, ready to run or to compile ahead of time."""

    kernel: Any
    programs: int
    args: dict[str, Any]
    options: dict[str, Any]


class Target(NamedTuple):
    """What the kernels are launched for.

    Attributes:
        vendor: "cuda", "hip", or "interpreter".
        multiprocessors: of the GPU; sets how many programs share a sequence.
        launch: takes a `Launch`. The ahead-of-time gate collects them instead of running them.
        arch: ten times the compute capability of an NVIDIA GPU, as in sm_80; AMD's do not differ.
    """

    vendor: str
    multiprocessors: int
    launch: Callable[[Launch], None]
    arch: int = 80


def rows(x: Tensor) -> Tensor:
    """`x` with contiguous features: the kernels read them 16 bytes at a time."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up; Triton's own takes microseconds, several times a launch."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The one that covers n, at least 16: the least that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def pieces(d: int, most: int) -> tuple[int, int]:
    """Powers of two, from 16 to `most`, that hold d columns; the second is 0 if one does."""
    first = min(most, power_of_2(d))
    return first, 0 if d <= first else power_of_2(d - first)


def strides_of(*tensors: Tensor) -> tuple[int, list[tuple[int, int, int]]]:
    """A power of two up to 16 that divides every stride, and the strides divided by it."""
    strides = [
        tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
        for t in tensors
    ]
    align = math.gcd(16, *(s for b, n, h, _ in strides for s in (b, n, h)))
    return align, [(b // align, n // align, h // align) for b, n, h, _ in strides]


def named(name: str, strides: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip((f"{name}_sb", f"{name}_sn", f"{name}_sh"), strides, strict=True))


def stride_arguments(**tensors: Tensor) -> dict[str, int]:
    """`ALIGN` and the strides of every tensor by name, as `strides_of` has them; made once a layout
    and not to be changed."""
    return _stride_arguments(tuple((name, t.shape, t.stride()) for name, t in tensors.items()))


@functools.lru_cache(4096)
def _stride_arguments(
    layouts: tuple[tuple[str, torch.Size, tuple[int, ...]], ...],
) -> dict[str, int]:
    found = {
        f"{name}_s{axis}": 0 if shape[i] == 1 else stride[i]
        for name, shape, stride in layouts
        for i, axis in enumerate("bnh")
    }
    align = math.gcd(16, *found.values())
    return {"ALIGN": align} | {name: stride // align for name, stride in found.items()}


def run(launch: Launch) -> None:
    device = next(x.device for x in launch.args.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        launch.kernel[(launch.programs,)](**launch.args, **launch.options)


def target_of(tensor: Tensor) -> Target:
    """The GPU of `tensor`; on a CPU the interpreter, the only thing that runs there."""
    return _target(tensor.device)


@functools.cache
def _target(device: torch.device) -> Target:
    if device.type != "cuda":
        return Target("interpreter", 1, run)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.multi_processor_count, run)
    arch = 10 * properties.major + properties.minor
    return Target("cuda", properties.multi_processor_count, run, arch)
