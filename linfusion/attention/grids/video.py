"""Where the tokens of a video lie: read when a transformer is called, handed to its attention.

The grid travels with the arguments of the blocks: a model may be called at any number of sizes, and
what gradient checkpointing computes again has the grid it had. Wan and SANA-Video pass a rotary
table from block to block, which carries it; in CogVideoX it is one of the attention's arguments.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

HOSTS = ("WanTransformer3DModel", "SanaVideoTransformer3DModel", "CogVideoXTransformer3DModel")
JOINT = "CogVideoXTransformer3DModel"  # text and video attend to one another

ARGUMENT = "video_grid"
_ARGUMENTS = "attention_kwargs"  # the hosts' own name
Grid = tuple[int, int, int]


class VideoRotary(tuple):
    """A rotary table (cos, sin) that also knows the grid (frames, height, width) of its tokens."""

    grid: Grid

    def __new__(cls, pair: Any, grid: Grid) -> VideoRotary:
        table = super().__new__(cls, pair)
        table.grid = grid
        return table

    def to(self, *args: Any, **kwargs: Any) -> VideoRotary:
        """On another device; offloading calls it on what it hands to a block."""
        return VideoRotary([x.to(*args, **kwargs) for x in self], self.grid)


def kind_of(model: nn.Module) -> str | None:
    """Which of `HOSTS` a model is, or None."""
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return next((host for host in HOSTS if host in kinds), None)


def grid_of(config: Mapping[str, Any], size: Grid) -> Grid:
    """Frames, height and width in tokens of a latent video of `size`.

    Args:
        config: of one of `HOSTS`.
        size: frames, height and width of the latents.
    """
    frames, height, width = (n // p for n, p in zip(size, patch_of(config), strict=True))
    return frames, height, width


def patch_of(config: Mapping[str, Any]) -> Grid:
    """Frames, height and width in latents of a token.

    "patch_size" is three numbers, or one for height and width beside "patch_size_t".
    """
    patch: Any = config["patch_size"]
    if isinstance(patch, int):
        return config.get("patch_size_t") or 1, patch, patch
    frames, height, width = patch
    return frames, height, width


def attach(model: nn.Module, settings: Mapping[str, Any]) -> None:
    """Have `model`, one of `HOSTS`, hand the grid of every call to the layers in `settings`."""
    if kind_of(model) != JOINT:
        model.get_submodule("rope").register_forward_hook(_hand_on)
        return
    model.register_forward_pre_hook(_read_latent, with_kwargs=True)
    for path, module in model.named_modules():
        if path not in settings and hasattr(module, "set_processor"):
            module.register_forward_pre_hook(_drop, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`; nothing is left."""
    for module in model.modules():
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(registry.items()):
                if hook in (_hand_on, _read_latent, _drop):
                    del registry[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _hand_on(rope: Any, args: Any, output: Any) -> VideoRotary:
    """After the rotary table of Wan or SANA-Video: the same, with the grid of its tokens."""
    size = args[0].shape[2:]
    return VideoRotary(output, grid_of({"patch_size": rope.patch_size}, size))


def _read_latent(model: Any, args: Any, kwargs: Any) -> tuple[tuple[()], dict[str, Any]]:
    """Before CogVideoX: the grid of its patches, among the arguments of its attention layers."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    arguments = given.get(_ARGUMENTS) or {}
    unknown = sorted(set(arguments) - {"scale"})
    if unknown:
        raise ValueError(
            f"{_ARGUMENTS}: got {', '.join(unknown)}; MATE's attention takes none but scale, the"
            " scale of a LoRA"
        )
    latents: Tensor = given["hidden_states"]  # [B, frames, C, h, w]
    frames, _, height, width = latents.shape[1:]
    grid = grid_of(model.config, (frames, height, width))
    given[_ARGUMENTS] = {**arguments, ARGUMENT: grid}
    return (), given


def _drop(attn: nn.Module, args: Any, kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Before a layer that was not taken: it would warn of an argument it does not know."""
    return args, {name: value for name, value in kwargs.items() if name != ARGUMENT}
