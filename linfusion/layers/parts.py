"""What others make of a part of a linear model: refused by name, where it would not fit."""

from __future__ import annotations

from typing import Any

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


def guard(record: Record) -> None:
    """Put a `WholeOnly` on every layer."""
    unguard(record)
    for path, taken in record.layers.items():
        taken.layer.register_state_dict_pre_hook(WholeOnly(path))


def unguard(record: Record) -> None:
    """Take them off."""
    for taken in record.layers.values():
        hooks = taken.layer._state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            if isinstance(hook, WholeOnly):
                del hooks[key]
