"""Registering operators, and asking for triton."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None

LIBRARY = torch.library.Library("linfusion", "FRAGMENT")


def autocasts(x: Tensor) -> bool:
    """Whether autocast is on where x is."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast leaves products alone: a half-precision sum is no state."""
    available = torch.amp.is_autocast_available(device.type)
    if not available or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def check_triton(device: torch.device) -> None:
    """Say why the Triton kernels cannot run on this device, if they cannot.

    Raises:
        ImportError: triton is not installed.
        ValueError: the device is not a GPU and triton does not interpret.
    """
    if not HAS_TRITON:
        raise ImportError("impl: 'triton' needs triton, which is not installed: pip install triton")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl: 'triton' needs tensors on a CUDA or ROCm device, got {device}; on a CPU it "
            "runs only interpreted, with TRITON_INTERPRET=1 set before triton is imported"
        )


def register(name: str, kernel: Any, fake: Any, grad: Any, save: Any = None) -> None:
    """Give an operator of `LIBRARY` its kernel for every device, fake and gradient.

    Args:
        name: as defined in `LIBRARY`.
        kernel: the first argument is a tensor; autocast is off inside.
        fake: shapes, dtypes and strides of what `kernel` returns.
        grad, save: as `torch.library.register_autograd` takes them.
    """
    qualified = f"linfusion::{name}"
    LIBRARY.impl(name, _exactly(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, grad, setup_context=save, lib=LIBRARY)


def _exactly(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any) -> Any:
        with without_autocast(x.device):
            return kernel(x, *args)

    return run
