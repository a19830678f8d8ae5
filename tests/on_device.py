"""Runs tests that were written for the CPU on another device, with the numbers of the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_FACTORIES = {
    getattr(torch, name)
    for name in (
        "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
        "randperm", "tensor", "zeros",
    )
}  # fmt: skip


class OnDevice(TorchFunctionMode):
    """Tensors made without a device come to `device`; random ones are drawn on the CPU first.

    So seeds and CPU generators give the same numbers on every device.
    """

    def __init__(self, device: torch.device | str) -> None:
        super().__init__()
        self.device = torch.device(device)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in _FACTORIES and kwargs.get("device") is None and "out" not in kwargs:
            grad = made.requires_grad
            return made.detach().to(self.device).requires_grad_(grad)
        return made
