"""Which layers of which model: finding them and choosing among them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from linfusion.attention import get_method, names
from linfusion.attention.grids import video as volumes
from linfusion.attention.mate.layer import MATE

# Names that diffusers' pipelines give to what denoises; Wan 2.2 has two, for high and low noise.
DENOISERS = ("unet", "transformer", "transformer_2", "prior", "decoder")

# Denoisers of embeddings: there is no picture in their tokens.
_NO_PICTURE = ("PriorTransformer",)


def models_of(model_or_pipe: Any) -> dict[str, nn.Module]:
    """The denoising models, by their names in a pipeline: a module itself, or all of a pipeline.

    A ControlNet of a pipeline is left alone, as are text encoders and the decoder of latents; pass
    `pipe.controlnet` to take it.

    Raises:
        ValueError: there is none.
    """
    if isinstance(model_or_pipe, nn.Module):
        found = {"": model_or_pipe}
    else:
        parts = ((name, getattr(model_or_pipe, name, None)) for name in DENOISERS)
        found = {
            name: model
            for name, model in parts
            if isinstance(model, nn.Module) and type(model).__name__ not in _NO_PICTURE
        }
    if not found:
        raise ValueError(
            f"model_or_pipe: got {type(model_or_pipe).__name__}, expected a torch module or a"
            " pipeline with a unet or a transformer"
        )
    # torch.compile wraps the module; what is changed is what it wraps.
    return {name: getattr(model, "_orig_mod", model) for name, model in found.items()}


def model_of(model_or_pipe: Any) -> nn.Module:
    """The first of the denoising models: what `models_of` finds, for pipelines with one.

    Raises:
        ValueError: there is none.
    """
    return next(iter(models_of(model_or_pipe).values()))


def candidates(model: nn.Module, method: str) -> dict[str, Any]:
    """The layers that `method` may take, by path.

    Raises:
        ValueError: the model has none.
    """
    return get_method(method).layers(model)


def refuse_linear_already(model: nn.Module) -> None:
    """Refuse a model that was built of linear layers.

    Raises:
        ValueError: it was.
    """
    layers = sum(isinstance(module, MATE) for module in model.modules())
    if layers:
        raise ValueError(
            f"model_or_pipe: {type(model).__name__} is linear already: its {layers} layers are MATE"
            " (Mamba-2 and windows), so there is nothing to make linear or to restore"
        )


def serving(model: nn.Module) -> list[str]:
    """Names of the methods that take layers of this model."""
    found = []
    for name in names():
        try:
            candidates(model, name)
        except ValueError:
            continue
        found.append(name)
    return found


def select(
    paths: Sequence[str], layers: str | Iterable[str], argument: str = "layers"
) -> list[str]:
    """Those of `paths` that are below a level ("down_blocks.0", "mid_block") or match a regex.

    Raises:
        ValueError: a selector is no regular expression or selects nothing.
    """
    chosen = set()
    for selector in [layers] if isinstance(layers, str) else layers:
        below = [p for p in paths if p == selector or p.startswith(f"{selector}.")]
        try:
            matched = below or [p for p in paths if re.search(selector, p)]
        except re.error as error:
            raise ValueError(
                f"{argument}: {selector!r} is neither a level nor a regex: {error}"
            ) from None
        if not matched:
            raise ValueError(f"{argument}: {selector!r} selects none of {shorten(paths)}")
        chosen.update(matched)
    if not chosen:
        raise ValueError(f"{argument}: got no selector; expected some of {shorten(paths)}")
    return [p for p in paths if p in chosen]


def tokens_at(model: nn.Module, path: str, size: tuple[int, ...]) -> int:
    """Tokens that a layer sees when the model denoises a latent of `size`.

    That is (height, width), and for a video transformer (frames, height, width).

    Raises:
        ValueError: the model is not of a kind whose levels are known.
    """
    config: Any = getattr(model, "config", {})
    if volumes.kind_of(model) is not None:
        frames, height, width = size
        return math.prod(volumes.grid_of(config, (frames, height, width)))
    if "3D" in type(model).__name__:  # as diffusers calls transformers of video
        raise ValueError(
            f'layers: "auto" does not know how many tokens {path} of {type(model).__name__} sees'
        )
    height, width = size
    blocks = config.get("block_out_channels")
    # FLUX: its pipelines pack 2×2 latents into a token, which its patch_size does not say.
    patch = 2 if "axes_dims_rope" in config else config.get("patch_size")
    if blocks is not None and re.match(r"(down_blocks|up_blocks|mid_block)\b", path):
        last = len(blocks) - 1
        head, *rest = path.split(".")
        level = last if head == "mid_block" else int(rest[0])
        level = last - level if head == "up_blocks" else level
        for _ in range(level):
            height, width = -(-height // 2), -(-width // 2)  # a stride-2 convolution rounds up
        return height * width
    if isinstance(patch, int):
        return (height // patch) * (width // patch)
    raise ValueError(
        f'layers: "auto" does not know how many tokens {path} of {type(model).__name__} sees'
    )


def latent_size(model_or_pipe: Any, size: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Of what the model is called with: height and width, before them the frames of a video."""
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if volumes.kind_of(model_of(model_or_pipe)) is not None:
        if len(sides) != 3 or not all(isinstance(n, int) and n > 0 for n in sides):
            raise ValueError(
                f'size: got {size!r}; layers="auto" needs frames, and height and width in pixels'
            )
        scale = getattr(model_or_pipe, "vae_scale_factor_spatial", 8)
        step = getattr(model_or_pipe, "vae_scale_factor_temporal", 4)
        return -(-(sides[0] - 1) // step) + 1, -(-sides[1] // scale), -(-sides[2] // scale)
    if len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise ValueError(
            f'size: got {size!r}; layers="auto" needs height and width in pixels, or one number'
        )
    scale = getattr(model_or_pipe, "vae_scale_factor", 8)
    return -(-sides[0] // scale), -(-sides[1] // scale)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in; under layerwise casting that is not what it stores.

    That of most of its numbers: single modules may be kept in float32, and what a host says of them
    (a bare string where a list is meant) misleads its own `dtype`.
    """
    for module in model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        hook = None if registry is None else registry.get_hook("layerwise_casting")
        if hook is not None:
            return hook.compute_dtype
    count: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            count[parameter.dtype] = count.get(parameter.dtype, 0) + parameter.numel()
    return max(count, key=count.__getitem__, default=torch.float32)


def shorten(names: Sequence[str], shown: int = 3) -> str:
    """`a, b, c (+5)`."""
    more = f" (+{len(names) - shown})" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
