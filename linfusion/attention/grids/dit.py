"""Height and width, in tokens, of what a DiT or PixArt is called with, handed to its attention.

The grid travels with the arguments of the blocks: a model may be called at any number of sizes, and
what gradient checkpointing computes again has the grid it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

HOSTS = ("DiTTransformer2DModel", "PixArtTransformer2DModel")
SQUARE = ("DiTTransformer2DModel",)  # it takes the root of its tokens for height and width

ARGUMENT = "grid"
_ARGUMENTS = "cross_attention_kwargs"  # the hosts' own name; self-attention gets them as well


def kind_of(model: nn.Module) -> str | None:
    """Which of `HOSTS` a model is, or None."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return next((host for host in HOSTS if host in kinds), None)


def attach(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Have `model` hand the grid of every call to the layers in `settings`, by path."""
    model.register_forward_pre_hook(_read_latent, with_kwargs=True)
    for path, module in model.named_modules():
        if path not in settings and hasattr(module, "set_processor"):
            module.register_forward_pre_hook(_drop, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing is left."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (_read_latent, _drop):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _read_latent(model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
    """Before the model: the grid of its patches, among the arguments of its attention layers."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    height, width = given["hidden_states"].shape[-2:]
    patch = model.config.patch_size
    grid = (height // patch, width // patch)
    if height != width and kind_of(model) in SQUARE:
        raise ValueError(
            f"hidden_states: got latents of {height} by {width}; {type(model).__name__} puts its"
            " tokens together as a square, so height and width have to be the same"
        )
    given[_ARGUMENTS] = {**(given.get(_ARGUMENTS) or {}), ARGUMENT: grid}
    return (), given


def _drop(attn: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Before a layer that was not taken: it would warn of an argument it does not know."""
    if getattr(attn.processor, "takes_grid", False):
        return args, kwargs
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}
