"""What others make of a part of a linear model: refused by name, where it would not fit."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from linfusion.layers.record import Record


class WholeOnly:
    """Before the state dict of a taken layer: that it is one of the whole model, or of the layer.

    diffusers builds ControlNets and motion UNets from the state dicts of a UNet's blocks.

    Args:
        path: of the layer in its model.
    """

    def __init__(self, path: str) -> None:
        self.depth = len(path.split("."))

    def __call__(self, attn: Any, prefix: str, keep_vars: bool) -> None:
        # Wrappers in between make a whole path longer, and never shorter.
        if 0 < prefix.count(".") < self.depth:
            raise ValueError(
                "state_dict: got a part of a linearized model, whose linear layers would not fit"
                " the same part of a softmax one (ControlNetModel.from_unet,"
                " UNetMotionModel.from_unet2d and AnimateDiffPipeline.from_pipe copy parts); call"
                " linfusion.restore first, and linfusion.linearize on what is made"
            )


def safe_only(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before the state dict of a linearized model: that diffusers is not about to pickle it.

    Pickled weights are never read for a student. What is asked for stands in the arguments of
    diffusers' `save_pretrained` alone, and a method of ours in its place would keep the model alive
    or be of another model in a copy.
    """
    from diffusers import ModelMixin

    code = ModelMixin.save_pretrained.__code__
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is not None and not frame.f_locals["safe_serialization"]:
        raise ValueError(
            "safe_serialization: got False; a linearized model is written as safetensors alone, as"
            " pickled weights are never read back: leave it out, or linfusion.restore first"
        )


def guard(model: nn.Module, record: Record) -> None:
    """Put a `WholeOnly` on every layer, and `safe_only` on the model."""
    unguard(model, record)
    model.register_state_dict_pre_hook(safe_only)
    for path, taken in record.layers.items():
        taken.layer.register_state_dict_pre_hook(WholeOnly(path))


def unguard(model: nn.Module, record: Record) -> None:
    """Take them off."""
    for module in (model, *(taken.layer for taken in record.layers.values())):
        hooks = module._state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if hook is safe_only or isinstance(hook, WholeOnly):
                del hooks[key]
