"""Putting things around the forwards of a model's parts, and taking them off without a trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers.hooks import HookRegistry, ModelHook
from torch import nn

NAME = "linfusion_parallel"


class Around(ModelHook):
    """Has `call(forward, inputs)` run in the place of a module's forward.

    Args:
        call: gets the forward that was there and the arguments of the call by name.
        names: of the forward's arguments.
    """

    def __init__(self, call: Callable[..., Any], names: list[str]) -> None:
        super().__init__()
        self.call, self.names = call, names

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        inputs = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return self.call(self.fn_ref.original_forward, inputs)


def put_around(module: nn.Module, call: Callable[..., Any], names: list[str]) -> Callable[[], None]:
    """Register an `Around` with diffusers' registry of hooks; returns what takes it off."""
    had_registry = hasattr(module, "_diffusers_hook")
    had_forward = "forward" in module.__dict__
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(Around(call, names), NAME)

    def undo() -> None:
        registry.remove_hook(NAME, recurse=False)
        if not registry.hooks:
            if not had_registry:
                del module._diffusers_hook
            if not had_forward:
                module.__dict__.pop("forward", None)

    return undo
