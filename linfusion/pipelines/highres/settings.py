"""What a call of `HighResPipeline` may name, checked and spread over the stages."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from linfusion.files.picture_reader import open_picture
from linfusion.pipelines.arguments import pixel_multiple
from linfusion.pipelines.highres.hosts import (
    controlnets,
    is_packed,
    is_transformer,
    later_steps,
)

# Arguments of the stages' calls that are decided here.
_OURS = {
    *("self", "args", "kwargs", "image", "strength", "latents", "num_images_per_prompt"),
    *("return_dict", "denoising_start", "denoising_end"),
}


def refuse_beyond_positions(pipe: Any, target: tuple[int, int]) -> None:
    if not is_transformer(pipe) or is_packed(pipe):
        return
    most = pipe.transformer.config.pos_embed_max_size
    limit = most * pixel_multiple(pipe)
    if max(target) > limit:
        raise ValueError(
            f"size: got {target[1]}×{target[0]}; {type(pipe.transformer).__name__} knows positions"
            f" of {most} tokens a side, so accepted are sides up to {limit} pixels"
        )


def guidance_scales(
    pipe: Any,
    given: Sequence[float] | float | None,
    known: tuple[float, float],
    count: int,
    draws: bool,
) -> list[float]:
    """One guidance scale a stage."""
    scales: list[Any] = list(known if draws else known[1:])
    if given is not None:
        if is_packed(pipe) and not pipe.transformer.config.guidance_embeds:
            raise ValueError(
                f"guidance_scale: got {given!r}, which a FLUX without a guidance embedding does not"
                " read; accepted is true_cfg_scale, with a negative_prompt"
            )
        if isinstance(given, str) or not isinstance(given, Sequence):
            given = [given]
        scales = list(given)
        if not 0 < len(scales) <= count:
            raise ValueError(
                f"guidance_scale: got {len(scales)} for {count} stages; accepted is one for all, or"
                " one a stage, or fewer: the last repeats"
            )
    for scale in scales:
        number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not number or not math.isfinite(scale):
            raise ValueError(f"guidance_scale: got {scale!r}; accepted are finite numbers")
    return [*scales[:count], *scales[-1:] * (count - len(scales))]


def pull_weight(pipe: Any, given: float | None) -> float | None:
    """The weight of low-resolution guidance; None where the size of a stage decides."""
    if given is None:
        return None
    if not is_transformer(pipe):
        raise ValueError(
            f"low_resolution_guidance: got {given!r}; {type(pipe).__name__} has no flow to project;"
            " accepted is None, or strategy='guided'"
        )
    if not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise ValueError(
            f"low_resolution_guidance: got {given!r}; accepted are numbers from 0 (off) to 1"
        )
    return float(given)


def negative(
    pipe: Any, sibling: Any, negative_prompt: str | list[str] | None, extra: dict[str, Any]
) -> dict[str, Any]:
    """The negative prompt, where it has an effect at every stage."""
    if not is_packed(pipe):
        return {"negative_prompt": negative_prompt}
    scale = extra.get("true_cfg_scale", 1.0)
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"true_cfg_scale: got {scale!r}; accepted are finite numbers")
    for name in ("negative_prompt", "true_cfg_scale"):
        if negative_prompt is None and name not in extra:
            continue
        for runs in (pipe, sibling):
            if name not in parameters_of(runs):
                raise ValueError(f"{name}: {type(runs).__name__} takes none; accepted is None")
    if negative_prompt is None:
        return {}
    if not scale > 1:
        raise ValueError(
            f"negative_prompt: got {negative_prompt!r}, which {type(pipe).__name__} would not read;"
            " it does with true_cfg_scale above 1"
        )
    return {"negative_prompt": negative_prompt}


def strengths_of(
    pipe: Any,
    strengths: Sequence[float] | float | None,
    known: list[float] | None,
    upscale_strength: float,
    count: int,
    steps: int,
) -> list[float]:
    name = "strengths"
    if strengths is not None:
        given = list(strengths) if isinstance(strengths, Sequence) else [strengths]
    elif known is not None:
        given = known
    else:  # "guided"
        name = "upscale_strength"
        given = [upscale_strength * (1 - i / count) for i in range(count)]
    if count and not given:
        raise ValueError(f"{name}: got none; accepted is one a stage, or fewer: the last repeats")
    for strength in given:
        if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"{name}: got {strength!r}; accepted are numbers above 0 and up to 1")
    given = [*given[:count], *given[-1:] * (count - len(given))]
    for strength in given:
        if later_steps(pipe, steps, strength) < 1:
            raise ValueError(
                f"{name}: {strength:.3g} of {steps} steps is no step; accepted is"
                f" {1 / steps:.3g} or more, or more num_inference_steps"
            )
    return given


def control_pictures(pipe: Any, control_image: Any) -> list[np.ndarray] | str | None:
    """The ControlNets' pictures."""
    nets = controlnets(pipe)
    if not nets:
        if control_image is not None:
            raise ValueError(
                f"control_image: {type(pipe).__name__} has no ControlNet; accepted is None"
            )
        return None
    count = len(nets)
    if isinstance(control_image, str) and control_image == "previous":
        return control_image
    given = control_image if isinstance(control_image, (list, tuple)) else [control_image]
    if len(given) != count or any(g is None for g in given):
        raise ValueError(
            f"control_image: got {len([g for g in given if g is not None])} for {count}"
            " ControlNets; accepted is a picture for each, or 'previous' for the enlarged picture"
            " of the stage before"
        )
    return [pixels_of("control_image", g) for g in given]


def pixels_of(name: str, picture: Any) -> np.ndarray:
    """A picture's pixels; of a file, only paths are opened."""
    if isinstance(picture, np.ndarray):
        return picture
    if not isinstance(picture, (str, os.PathLike, Image.Image)):
        raise ValueError(
            f"{name}: got {picture!r}; accepted are the path of a file, a Pillow image or uint8"
            " [H, W, 3]"
        )
    return open_picture(picture)


def further_arguments(pipe: Any, sibling: Any, extra: dict[str, Any]) -> dict[str, Any]:
    """Further arguments of the pipelines' calls, those that nobody takes refused."""
    accepted = set(parameters_of(pipe)) | set(parameters_of(sibling))
    if unknown := sorted(set(extra) - (accepted - _OURS)):
        raise ValueError(
            f"{unknown[0]}: {type(pipe).__name__} takes no such argument here; accepted are"
            f" {', '.join(sorted(accepted - _OURS))}"
        )
    return extra


def parameters_of(pipe: Any) -> list[str]:
    """Names of the arguments of a pipeline's call."""
    return list(inspect.signature(type(pipe).__call__).parameters)
