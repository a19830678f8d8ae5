"""What a call of `HighResPipeline` may name: sizes and settings, spread over the stages."""

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

LONGEST = 32_768  # pixels: a gigapixel
MOST_STAGES = 32
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


def check_side(name: str, side: Any, unit: int) -> None:
    """Refuse a side that is no multiple of the latent grid, and offer those that are near."""
    if isinstance(side, int) and side > LONGEST:
        raise ValueError(f"{name}: got {side:,}; accepted are up to {LONGEST:,} pixels")
    if not isinstance(side, int) or isinstance(side, bool) or side < unit or side % unit:
        near = ""
        if isinstance(side, int) and side > 0:
            low = side // unit * unit
            near = (
                f"; the nearest are {low} and {low + unit}" if low else f"; the nearest is {unit}"
            )
        raise ValueError(f"{name}: got {side!r}; accepted are multiples of {unit} pixels{near}")


def split(
    base: tuple[int, int],
    target: tuple[int, int],
    factor: float,
    unit: int,
    *,
    from_picture: bool,
) -> list[tuple[int, int]]:
    """Sizes (height, width) from `base` on, each `factor` times the one before, to the target.

    A last jump of less than factor^0.2 is not worth a stage: the one before goes the whole way.

    Args:
        from_picture: `base` is there already; it is left out then, and the target always in.

    Raises:
        ValueError: more than `MOST_STAGES`.
    """
    ratio = max(target) / max(base)
    count = max(math.ceil(math.log(ratio) / math.log(factor) - 0.2), 0) if ratio > 1 else 0
    if count > MOST_STAGES:
        least = math.ceil(100 * ratio ** (1 / MOST_STAGES)) / 100
        raise ValueError(
            f"factor: got {factor}, which makes {count:,} stages of {max(base)} to {max(target)}"
            f" pixels; accepted is {least:.2f} or more, for at most {MOST_STAGES}"
        )
    count = max(count, int(from_picture or base != target))
    sizes = [] if from_picture else [base]
    for i in range(1, count):
        scale = max(base) * factor**i / max(target)
        sizes.append((_near(target[0] * scale, unit), _near(target[1] * scale, unit)))
    return [*sizes, target] if count else sizes


def _near(side: float, unit: int) -> int:
    return max(unit, round(side / unit) * unit)


def target_size(
    height: int | None, width: int | None, size: int | tuple[int, int] | None
) -> tuple[int, int]:
    if size is None and height is not None and width is not None:
        return height, width
    if size is None or height is not None or width is not None:
        raise ValueError(
            f"size: got size={size!r}, height={height!r}, width={width!r}; accepted is either size"
            " (one side, or height and width) or both of height and width"
        )
    return _pair("size", size)


def _pair(name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Sequence) and len(size) == 2:
        return size[0], size[1]
    raise ValueError(f"{name}: got {size!r}; accepted is a side or (height, width) in pixels")


def first_size(
    base_size: int | tuple[int, int] | None, target: tuple[int, int], native: int, unit: int
) -> tuple[int, int]:
    """The area the model was made for, in the aspect of the target."""
    if base_size is None:
        if native > max(target):
            raise ValueError(
                f"size: got {target[1]}×{target[0]}, which is smaller than the {native} pixels this"
                " model starts from; name a smaller base_size, or a larger size"
            )
        scale = min(1.0, native / math.sqrt(target[0] * target[1]))
        return _near(target[0] * scale, unit), _near(target[1] * scale, unit)
    base = _pair("base_size", base_size)
    if isinstance(base_size, int):  # the longer side
        check_side("base_size", base_size, unit)
        base = (
            _near(target[0] * base_size / max(target), unit),
            _near(target[1] * base_size / max(target), unit),
        )
    for side in base:
        check_side("base_size", side, unit)
    if base[0] > target[0] or base[1] > target[1]:
        raise ValueError(
            f"base_size: got {base[1]}×{base[0]}; accepted is up to the size,"
            f" {target[1]}×{target[0]}"
        )
    return base


def picture_size(picture: np.ndarray, target: tuple[int, int], unit: int) -> tuple[int, int]:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(
            f"image: got {picture.dtype} {list(picture.shape)}; accepted are a file, a Pillow image"
            " or uint8 [H, W, 3]"
        )
    height, width = picture.shape[:2]
    if height > target[0] or width > target[1]:
        raise ValueError(
            f"size: got {target[1]}×{target[0]}, which is smaller than the image, {width}×{height}"
        )
    if abs(target[0] * width / (target[1] * height) - 1) > 0.02:
        scale = math.sqrt(target[0] * target[1] / (height * width))
        fits = _near(width * scale, unit), _near(height * scale, unit)
        raise ValueError(
            f"size: got {target[1]}×{target[0]}, which would stretch the image of {width}×{height};"
            f" of its shape is {fits[0]}×{fits[1]}"
        )
    return height, width
