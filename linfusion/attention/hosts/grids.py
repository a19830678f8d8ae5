"""Where the grid of a model's tokens is among the arguments of its forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from linfusion.attention.grids.joint import grids_of
from linfusion.attention.hosts.host import Arguments, Grid, Levels, PerSample, Piece

Reader = Callable[[Arguments, Arguments], Any]


def latent(name: str = "hidden_states", axes: tuple[int, ...] | None = None) -> Reader:
    """The patches of a latent picture or video, the argument `name`.

    Args:
        name: of the argument.
        axes: those of (frames,) height and width in it; None is all from the third.
    """

    def read(arguments: Arguments, config: Arguments) -> Grid:
        x = arguments[name]
        size = tuple(x.shape[2:]) if axes is None else tuple(x.shape[axis] for axis in axes)
        patch = patch_of(config)[-len(size) :]
        # What does not fill a patch is padded by some hosts and refused by the others.
        return tuple(-(-n // p) for n, p in zip(size, patch, strict=True))

    return read


def patch_of(config: Arguments) -> Grid:
    """Frames, height and width in latents of a token, whatever the config calls them."""
    patch: Any = config.get("patch_size", 1)
    frames = config.get("patch_size_t") or config.get("temporal_patch_size") or 1
    if isinstance(patch, int):
        return frames, patch, patch
    return (frames, *patch) if len(patch) == 2 else tuple(patch)


def position_ids(*names: str) -> Reader:
    """Position ids of tokens (picture, row, column, ...), whole pictures in raster order."""

    def read(arguments: Arguments, config: Arguments) -> list[Piece]:
        found: list[Piece] = []
        for name in names:
            ids: Tensor | None = arguments.get(name)
            if ids is not None:
                ids = ids[0] if ids.ndim == 3 else ids
                found += grids_of(ids[:, :3])[0].sizes
        if not found:
            raise KeyError(names[0])
        return found

    return read


def image_shapes(arguments: Arguments, config: Arguments) -> list[Piece]:
    """Qwen's `img_shapes`: (frames, height, width) of each picture, the same for all samples."""
    shapes = arguments["img_shapes"]
    first = shapes[0] if isinstance(shapes, list) else shapes
    first = [first] if isinstance(first[0], int) else first
    return [tuple(int(n) for n in shape) for shape in first]


def numbers(*names: str) -> Reader:
    """Arguments that are the grid: frames, height and width in tokens."""

    def read(arguments: Arguments, config: Arguments) -> Grid:
        return tuple(int(arguments[name]) for name in names)

    return read


def levels(arguments: Arguments, config: Arguments) -> Levels:
    """Of a UNet: height and width of its latents, halved (rounding up) from level to level."""
    height, width = arguments["sample"].shape[-2:]
    found = []
    for _ in config["block_out_channels"]:
        found.append((height, width))
        height, width = -(-height // 2), -(-width // 2)
    return Levels(found)


def uvit(arguments: Arguments, config: Arguments) -> Grid:
    """UVit: height and width of its codes, halved where it samples down."""
    height, width = arguments["input_ids"].shape[1:]
    return (height // 2, width // 2) if config.get("downsample") else (height, width)


def z_image(arguments: Arguments, config: Arguments) -> PerSample:
    """Z-Image: a list of pictures, each padded to a multiple of 32 tokens.

    Raises:
        ValueError: pictures to look at, which come as lists.
    """
    patch, frames = arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)
    found = []
    for x in arguments["x"]:
        if not isinstance(x, Tensor):
            raise ValueError(
                "x: got lists of pictures; windows know the grid of Z-Image with one picture a"
                " sample"
            )
        grid = (x.shape[1] // frames, x.shape[2] // patch, x.shape[3] // patch)
        found.append([grid, -math.prod(grid) % 32])
    return PerSample(found)


def krea2(arguments: Arguments, config: Arguments) -> list[Piece]:
    """Krea 2: rows (picture, row, column) of all tokens, those of the text first."""
    text = arguments["encoder_hidden_states"].shape[1]
    ids = arguments["position_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return list(grids_of(ids[text:, :3])[0].sizes)


def frame_pack(arguments: Arguments, config: Arguments) -> list[Piece]:
    """FramePack: earlier frames at three scales, which every token sees, then the video."""
    patch = patch_of(config)
    found: list[Piece] = []
    for name, factor in (
        ("latents_history_4x", 4),
        ("latents_history_2x", 2),
        ("latents_clean", 1),
    ):
        x = arguments.get(name)
        if x is not None:
            sides = [-(-n // (factor * p)) for n, p in zip(x.shape[2:], patch, strict=True)]
            found.append(math.prod(sides))
    return [sum(p for p in found if isinstance(p, int)), latent()(arguments, config)]


def fibo2(arguments: Arguments, config: Arguments) -> list[Piece]:
    """Fibo 2: the picture and those to look at.

    Raises:
        ValueError: prompts of different length, for which the model changes the order of tokens.
    """
    mask = arguments.get("encoder_attention_mask")
    if mask is not None and len(set(mask.sum(1).tolist())) > 1:
        raise ValueError(
            "encoder_attention_mask: got prompts of different length, for which Fibo 2 puts the"
            " text last; call it with one prompt at a time"
        )
    read = latent()
    pictures = [arguments["hidden_states"], *(arguments.get("context_latents") or [])]
    return [read({"hidden_states": x}, config) for x in pictures]


def qwen21(arguments: Arguments, config: Arguments) -> list[Piece]:
    """Qwen-Image 2.1: the picture being made; those before it are seen by all of it."""
    return image_shapes(arguments, config)[-1:]


def qwen21_before(arguments: Arguments) -> list[int]:
    """Tokens of Qwen-Image 2.1 before the picture being made: text and other pictures."""
    pictures = [math.prod(g) for g in image_shapes(arguments, {}) if not isinstance(g, int)]
    text = arguments["encoder_hidden_states"].shape[1]
    slots = int(arguments["img_mask"][0, :text].sum())  # each stands for 2 by 2 tokens
    return [text - slots + sum(pictures[:-1])]
