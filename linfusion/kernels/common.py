"""What every family of kernels asks of its arguments, and which implementation then runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linfusion.kernels import library

IMPLEMENTATIONS = ("reference", "blocked", "triton")


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums, scores and states: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_tensor(x: Tensor, name: str, axes: str) -> None:
    """A floating tensor with the axes that `axes` names, as in "[B, N, H, D]", none of them empty.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {axes}, got {type(x).__name__}")
    count = axes.count(",") + 1
    if x.dim() != count:
        noun = "axis" if count == 1 else "axes"
        raise ValueError(f"{name}: expected {count} {noun} {axes}, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(
            f"{name}: expected a real floating dtype (float16, bfloat16, float32, float64), "
            f"got {x.dtype}"
        )
    if x.numel() == 0:
        raise ValueError(
            f"{name}: expected every axis of {axes} to be at least 1, got shape {tuple(x.shape)}"
        )


def check_device(x: Tensor, name: str, other: Tensor, of: str) -> None:
    """On the device of the tensor that is called `of`.

    Raises:
        ValueError: it is not.
    """
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {of}, {other.device}, got {x.device}")


def implementation(
    impl: str | None, x: Tensor, dtype: torch.dtype, unfit: Callable[[], str | None]
) -> str:
    """The implementation that runs: the named one, or what serves the device best.

    Args:
        impl: one of `IMPLEMENTATIONS`, or None for "triton" where it runs, else "blocked".
        x: a tensor on the device.
        dtype: of sums; the Triton kernels have no float64.
        unfit: what the Triton kernels of the family do not take of these inputs, as in "'triton'
            takes ..., got ...", or None.

    Raises:
        ValueError: no such implementation, or one that does not take these inputs.
        ImportError: "triton" without triton.
    """
    if impl is None:
        on_gpu = x.device.type == "cuda"  # ROCm calls itself cuda too
        fits = on_gpu and library.HAS_TRITON and dtype != torch.float64 and unfit() is None
        return "triton" if fits else "blocked"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: expected None or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl == "triton":
        if dtype == torch.float64:
            raise ValueError(
                "impl: 'triton' takes float16, bfloat16 and float32, got float64; 'blocked' and "
                "'reference' take it"
            )
        if (reason := unfit()) is not None:
            raise ValueError(f"impl: {reason}; 'blocked' and 'reference' take any")
        library.check_triton(x.device)
    return impl
