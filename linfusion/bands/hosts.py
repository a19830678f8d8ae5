"""The models that the engine of bands knows, and where they run."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TRANSFORMERS = ("FluxTransformer2DModel", "SD3Transformer2DModel")


def unwrapped(model: Any) -> Any:
    """The model itself, where `torch.compile` gave another module in its place."""
    return getattr(model, "_orig_mod", model)


def wait_for(device: torch.device) -> None:
    """Before a clock is read: what was launched on an accelerator is done."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def execution_device(model: nn.Module) -> torch.device:
    """Where a model computes; under offloading its weights are elsewhere until then."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
        registry = getattr(module, "_diffusers_hook", None)
        for one in getattr(registry, "hooks", {}).values():
            if (device := getattr(getattr(one, "group", None), "onload_device", None)) is not None:
                return torch.device(device)
    return next(t.device for t in [*model.parameters(), *model.buffers()])
