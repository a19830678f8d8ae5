"""Changing a model that accelerate or diffusers already offloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Take offloading hooks off the layers of a model, and put them back over what it has then.

    Under sequential offloading the weights are elsewhere (the parameters are on the meta device),
    and a new child would have no hook; under group offloading the groups list their parameters.
    Hooks on the whole model (model offloading) need neither, as they call `model.to`.
    """
    device = _sequential_device(model)
    if device is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(model, recurse=True)
    group = _lift_groups(model)
    try:
        yield
    finally:
        if group is not None:
            from diffusers.hooks.group_offloading import _apply_group_offloading

            _apply_group_offloading(model, group)
        if device is not None:
            from accelerate import cpu_offload

            cpu_offload(model, device, offload_buffers=len(model._parameters) > 0)


def _sequential_device(model: nn.Module) -> Any:
    """Where layers that are offloaded one by one execute, or None."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", [hook]):
            if getattr(one, "offload", False) is True:
                return one.execution_device
    return None


def _lift_groups(model: nn.Module) -> Any:
    """Remove diffusers' group offloading; returns its configuration, or None if there is none."""
    if not any(hasattr(module, "_diffusers_hook") for module in model.modules()):
        return None
    from diffusers.hooks import group_offloading as groups
    from diffusers.hooks.hooks import HookRegistry

    top = groups._get_top_level_group_offload_hook(model)
    if top is None:
        return None
    if top.config.offload_to_disk_path is not None:
        raise ValueError(
            "model_or_pipe: its weights are offloaded to disk; make it linear before that"
        )
    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in (
        groups._GROUP_OFFLOADING,
        groups._LAYER_EXECUTION_TRACKER,
        groups._LAZY_PREFETCH_GROUP_OFFLOADING,
    ):
        registry.remove_hook(name, recurse=True)
    return top.config
