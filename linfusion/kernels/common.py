"""What every family of kernels asks of its arguments, and which implementation then runs."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from linfusion.kernels import library

IMPLEMENTATIONS = ("reference", "blocked", "triton")

_TAKES: dict[torch.device, bool] = {}
_ASKED = threading.Lock()


def accumulator(*tensors: Tensor) -> torch.dtype:
    """The dtype of sums, scores and states: float64 if any input is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_tensor(x: Tensor, name: str, axes: str) -> None:
    """A floating tensor with the axes that `axes` names, as in "[B, N, H, D]" or "[..., C]", none
    of them empty.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"{name}: expected a tensor {axes}, got {type(x).__name__}")
    more = axes.startswith("[...")
    count = axes.count(",") + 1 - more
    if x.dim() != count and not (more and x.dim() > count):
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


def takes_triton(device: torch.device) -> bool:
    """Whether this GPU is one that the Triton kernels are made for, and runs them.

    That is an NVIDIA GPU since Ampere (sm_80) or an AMD Instinct (gfx9), where triton is installed
    and finds a compiler. Below sm_80 kernels would run without tensor cores, and on other GPUs of
    AMD they spill. Asked once a device; if it is not, a warning says why.
    """
    with _ASKED:
        if device not in _TAKES:
            reason = _why_not(device)
            _TAKES[device] = reason is None
            if reason is not None:
                warnings.warn(
                    f"{device}: {reason}; kernels of linfusion run in their blocked form there,"
                    " which is slower",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return _TAKES[device]


# `torch.compiler.assume_constant_result`, without importing the compiler.
takes_triton._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not(device: torch.device) -> str | None:
    if sys.platform == "win32":
        return "the Triton kernels are not made for Windows"
    if not library.HAS_TRITON:
        return "triton is not installed"
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if not name.startswith("gfx9"):
            return f"the Triton kernels spill on {name}"
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the Triton kernels need compute capability 8.0, this GPU has {capability}"
    try:
        from linfusion.kernels.probe import probe_runs

        return None if probe_runs(device) else "a Triton kernel gave a wrong result"
    except Exception as error:  # whatever a compiler, a driver or an import may raise
        return f"no Triton kernel runs ({type(error).__name__}: {str(error)[:200]})"


def implementation(
    impl: str | None, x: Tensor, dtype: torch.dtype, unfit: Callable[[], str | None]
) -> str:
    """The implementation that runs: the named one, or what serves the device best.

    Args:
        impl: one of `IMPLEMENTATIONS`, or None for "triton" on a GPU that takes it, else "blocked".
        x: a tensor on the device.
        dtype: of sums; the Triton kernels have no float64.
        unfit: what the Triton kernels of the family do not take of these inputs, as in "'triton'
            takes ..., got ...", or None.

    Raises:
        ValueError: no such implementation, or one that does not take these inputs.
        ImportError: "triton" without triton.
    """
    if impl is None:
        # Asked last: it takes a moment, once.
        fits = x.device.type == "cuda" and dtype != torch.float64 and unfit() is None
        return "triton" if fits and takes_triton(x.device) else "blocked"
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
