"""What a high-resolution run is to do: its stages, checked before any work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoPipelineForImage2Image
from PIL import Image
from torch import nn

from linfusion.pipelines.guided import Scales
from linfusion.pipelines.pictures import bytes_needed, open_picture

STRATEGIES = ("sdedit", "guided", "superres")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
STRENGTHS = {"sdedit": (0.4, 0.3, 0.2, 0.1), "superres": (0.32, 0.24, 0.16, 0.08)}
# Arguments of the stages' calls that are decided here.
_OURS = {
    *("self", "args", "kwargs", "image", "strength", "latents", "num_images_per_prompt"),
    *("return_dict", "denoising_start", "denoising_end"),
}


@dataclass(frozen=True)
class Stage:
    """One run of the denoiser.

    Attributes:
        height, width: in pixels.
        strength: of the noise put onto the enlarged picture; None starts from noise alone.
        steps: calls of the denoiser.
        ratio: how much larger it is than what the model was made for (`guided` and `superres`).
    """

    height: int
    width: int
    strength: float | None
    steps: int
    ratio: int = 1

    @property
    def name(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class Job:
    """A checked call of `HighResPipeline`."""

    stages: tuple[Stage, ...]
    strategy: str
    scales: Scales
    num_inference_steps: int
    picture: np.ndarray | None
    control: list[np.ndarray] | str | None
    call: dict[str, Any] = field(repr=False)
    output: Path | None = None
    output_type: str = "pil"

    @property
    def height(self) -> int:
        return self.stages[-1].height

    @property
    def width(self) -> int:
        return self.stages[-1].width

    @property
    def steers(self) -> bool:
        """Whether later stages follow the recipe of `guided`."""
        return self.strategy != "sdedit"


def image_to_image(pipe: Any) -> Any:
    """The pipeline of the later stages: the same parts, another loop.

    Raises:
        ValueError: `pipe` has no UNet, or no image-to-image sibling in diffusers.
    """
    accepted = (
        "accepted is a text-to-image pipeline with a UNet, such as StableDiffusionPipeline,"
        " StableDiffusionXLPipeline or their ControlNet forms"
    )
    if not isinstance(getattr(pipe, "unet", None), nn.Module):
        raise ValueError(f"pipe: got {type(pipe).__name__}; {accepted}")
    try:
        sibling = AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError as error:
        raise ValueError(
            f"pipe: {type(pipe).__name__} has no image-to-image form in diffusers ({error});"
            f" {accepted}"
        ) from error
    if type(sibling) is type(pipe):
        raise ValueError(f"pipe: {type(pipe).__name__} is image-to-image; {accepted}")
    if getattr(pipe.vae.config, "latents_mean", None) is not None:
        raise ValueError(
            "pipe: its VAE has latents_mean; accepted are VAEs with a scaling_factor alone"
        )
    return sibling


def make_job(
    pipe: Any,
    sibling: Any,
    *,
    prompt: str | list[str] | None,
    height: int | None,
    width: int | None,
    size: int | tuple[int, int] | None,
    base_size: int | tuple[int, int] | None,
    factor: float,
    image: Any,
    control_image: Any,
    strategy: str,
    strengths: Sequence[float] | float | None,
    upscale_strength: float,
    scales: Scales,
    num_inference_steps: int,
    guidance_scale: float,
    negative_prompt: str | list[str] | None,
    output: str | Path | None,
    output_type: str,
    extra: dict[str, Any],
) -> Job:
    """Check a call, and cut it into stages. The arguments are those of `HighResPipeline`.

    Raises:
        ValueError: one that cannot be done; it names the argument, what came and what is accepted.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}; accepted are {', '.join(STRATEGIES)}")
    if strategy == "superres" and image is None:
        raise ValueError("image: strategy 'superres' starts from a picture, and got None")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: got {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}")
    if isinstance(prompt, (list, tuple)):
        if len(prompt) != 1:
            raise ValueError(f"prompt: got {len(prompt)} prompts; accepted is one, for one picture")
        prompt = prompt[0]
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: got {num_inference_steps!r}; accepted: 1 or more")
    if not factor > 1:
        raise ValueError(f"factor: got {factor!r}; accepted is a number above 1")
    order = pipe.scheduler.order
    if strategy != "sdedit" and order != 1:
        raise ValueError(
            f"strategy: {strategy!r} needs a scheduler that calls the denoiser once a step;"
            f" {type(pipe.scheduler).__name__} calls it {order} times"
        )
    target = _target(height, width, size)
    unit = pipe.vae_scale_factor
    for name, side in zip(("height", "width"), target, strict=True):
        check_side(name, side, unit)
    native = native_size(pipe)
    picture = None
    if image is not None:
        picture = image if isinstance(image, np.ndarray) else open_picture(image)
        base = _picture_size(picture, target, unit)
    else:
        base = _base_size(base_size, target, native, unit)
    sizes = split(base, target, factor, unit, from_picture=picture is not None)
    later = len(sizes) - (picture is None)
    strength_of = _strengths(strengths, strategy, upscale_strength, later, num_inference_steps)
    stages = []
    if picture is None:
        count = num_inference_steps * order - (order - 1)
        stages.append(Stage(*sizes.pop(0), strength=None, steps=count))
    for at, strength in zip(sizes, strength_of, strict=True):
        count = min(int(num_inference_steps * strength), num_inference_steps)
        if strategy == "superres":
            ratio = math.ceil(max(at) / native)
        else:
            ratio = max(1, round(max(at) / max(base)))
        stages.append(Stage(*at, strength=strength, steps=count * order - (order - 1), ratio=ratio))
    if output is not None:
        output = Path(output)
        bytes_needed(output, target[1], target[0])  # refuses what cannot be written
    return Job(
        stages=tuple(stages),
        strategy=strategy,
        scales=scales,
        num_inference_steps=num_inference_steps,
        picture=picture,
        control=_control(pipe, control_image),
        call={
            "prompt": prompt,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            **_extra(pipe, sibling, extra),
        },
        output=output,
        output_type=output_type,
    )


def native_size(pipe: Any) -> int:
    """The side in pixels that the model was made for."""
    own = pipe.unet.config.sample_size
    return (max(own) if isinstance(own, (list, tuple)) else own) * pipe.vae_scale_factor


def check_side(name: str, side: Any, unit: int) -> None:
    """Refuse a side that is no multiple of the latent grid, and offer those that are near."""
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
    """
    ratio = max(target) / max(base)
    count = max(math.ceil(math.log(ratio, factor) - 0.2), 0) if ratio > 1 else 0
    count = max(count, int(from_picture or base != target))
    sizes = [] if from_picture else [base]
    for i in range(1, count):
        scale = max(base) * factor**i / max(target)
        sizes.append((_near(target[0] * scale, unit), _near(target[1] * scale, unit)))
    return [*sizes, target] if count else sizes


def _near(side: float, unit: int) -> int:
    return max(unit, round(side / unit) * unit)


def _target(
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


def _base_size(
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


def _picture_size(picture: np.ndarray, target: tuple[int, int], unit: int) -> tuple[int, int]:
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


def _strengths(
    strengths: Sequence[float] | float | None,
    strategy: str,
    upscale_strength: float,
    count: int,
    steps: int,
) -> list[float]:
    name = "strengths"
    if strengths is None:
        if strategy == "guided":
            name = "upscale_strength"
            given = [upscale_strength * (1 - i / count) for i in range(count)]
        else:
            given = list(STRENGTHS[strategy])
    else:
        given = list(strengths) if isinstance(strengths, Sequence) else [strengths]
    if count and not given:
        raise ValueError(f"{name}: got none; accepted is one a stage, or fewer: the last repeats")
    for strength in given:
        if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
            raise ValueError(f"{name}: got {strength!r}; accepted are numbers above 0 and up to 1")
    given = [*given[:count], *given[-1:] * (count - len(given))]
    for strength in given:
        if int(steps * strength) < 1:
            raise ValueError(
                f"{name}: {strength:.3g} of {steps} steps is no step; accepted is"
                f" {1 / steps:.3g} or more, or more num_inference_steps"
            )
    return given


def _control(pipe: Any, control_image: Any) -> list[np.ndarray] | str | None:
    """The ControlNets' pictures."""
    nets = getattr(pipe, "controlnet", None)
    if nets is None:
        if control_image is not None:
            raise ValueError(
                f"control_image: {type(pipe).__name__} has no ControlNet; accepted is None"
            )
        return None
    count = len(getattr(nets, "nets", [nets]))
    if isinstance(control_image, str) and control_image == "previous":
        return control_image
    given = control_image if isinstance(control_image, (list, tuple)) else [control_image]
    if len(given) != count or any(g is None for g in given):
        raise ValueError(
            f"control_image: got {len([g for g in given if g is not None])} for {count}"
            " ControlNets; accepted is a picture for each, or 'previous' for the enlarged picture"
            " of the stage before"
        )
    return [g if isinstance(g, np.ndarray) else open_picture(g) for g in given]


def _extra(pipe: Any, sibling: Any, extra: dict[str, Any]) -> dict[str, Any]:
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


def as_picture(array: Any) -> Image.Image:
    """Rows of uint8 [H, W, 3], whole, as Pillow has them."""
    return Image.fromarray(np.ascontiguousarray(array[0 : array.shape[0]]))


def one_generator(generator: Any, seed: int | None) -> torch.Generator:
    """The caller's generator, or one with this seed, or with a fresh one.

    Raises:
        ValueError: several of them, for one picture.
    """
    if isinstance(generator, (list, tuple)):
        if len(generator) != 1:
            raise ValueError(f"generator: got {len(generator)}; accepted is one, for one picture")
        generator = generator[0]
    if generator is None:
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
    return generator
