"""What a high-resolution run is to do: its stages, checked before any work."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from linfusion.files.picture_reader import bytes_needed, open_picture
from linfusion.pipelines.arguments import pixel_multiple, text_length
from linfusion.pipelines.highres.guided import Scales
from linfusion.pipelines.highres.hosts import (
    controlnets,
    is_packed,
    is_transformer,
    later_steps,
    native_size,
    recipe,
)
from linfusion.pipelines.highres.shift import stage_shift
from linfusion.pipelines.highres.sizes import (
    check_side,
    first_size,
    picture_size,
    split,
    target_size,
)

STRATEGIES = ("sdedit", "guided", "superres")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GUIDED_ABOVE = 4096  # pixels of the longer side, from which on low-resolution guidance is on
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
        guidance_scale: of the pipeline's call.
        ratio: how much larger it is than what the model was made for (`guided` and `superres`).
        pull: weight of the enlarged picture at the first step, see
            `linfusion.pipelines.highres.low_resolution_guidance`.
        enlarged: how much longer its sides are than those of the stage or picture before.
    """

    height: int
    width: int
    strength: float | None
    steps: int
    guidance_scale: float
    ratio: int = 1
    pull: float = 0.0
    enlarged: float = 1.0

    @property
    def name(self) -> str:
        return f"{self.width}×{self.height}"


@dataclass(frozen=True)
class Job:
    """A checked call of `HighResPipeline`."""

    stages: tuple[Stage, ...]
    strategy: str
    steers: bool  # whether later stages follow the recipe of `guided`
    scales: Scales
    num_inference_steps: int
    picture: np.ndarray | None
    control: list[np.ndarray] | str | None
    call: dict[str, Any] = field(repr=False)
    output: Path | None = None
    output_type: str = "pil"
    shift: float | None = None  # of the later stages; None is the scheduler's own
    softmax_base: bool = False  # whether a linear transformer draws the base picture with softmax

    @property
    def passes(self) -> int:
        """Forwards of a step: FLUX runs those of true guidance one after the other."""
        negative = self.call.get("negative_prompt", self.call.get("negative_prompt_embeds"))
        return 1 + (negative is not None and self.call.get("true_cfg_scale", 1.0) > 1)

    @property
    def height(self) -> int:
        return self.stages[-1].height

    @property
    def width(self) -> int:
        return self.stages[-1].width


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
    num_inference_steps: int | None,
    guidance_scale: Sequence[float] | float | None,
    negative_prompt: str | list[str] | None,
    shift: float | None,
    low_resolution_guidance: float | None,
    output: str | Path | None,
    output_type: str,
    extra: dict[str, Any],
    pooled: int = 1,
) -> Job:
    """Check a call, and cut it into stages. The arguments are those of `HighResPipeline`.

    Args:
        pooled: tokens a side that are pooled into one, see `linfusion.attention.clear`.

    Raises:
        ValueError: one that cannot be done; it names the argument, what came and what is accepted.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}; accepted are {', '.join(STRATEGIES)}")
    flows = is_transformer(pipe)
    if strategy == "guided" and flows:
        raise ValueError(
            f"strategy: 'guided' dilates convolutions, and {type(pipe.transformer).__name__} has"
            " none; accepted are 'sdedit', and 'superres' from a picture"
        )
    if strategy == "superres" and image is None:
        raise ValueError("image: strategy 'superres' starts from a picture, and got None")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type: got {output_type!r}; accepted: {', '.join(OUTPUT_TYPES)}")
    if isinstance(prompt, (list, tuple)):
        if len(prompt) != 1:
            raise ValueError(f"prompt: got {len(prompt)} prompts; accepted is one, for one picture")
        prompt = prompt[0]
    known = recipe(pipe)
    if num_inference_steps is None:
        num_inference_steps = known.steps
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: got {num_inference_steps!r}; accepted: 1 or more")
    if not 1 < factor < math.inf:
        raise ValueError(f"factor: got {factor!r}; accepted is a number above 1")
    for name, value in vars(scales).items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: got {value!r}; accepted are numbers from 0 up")
    order = pipe.scheduler.order
    steers = strategy != "sdedit" and not flows
    if steers and order != 1:
        raise ValueError(
            f"strategy: {strategy!r} needs a scheduler that calls the denoiser once a step;"
            f" {type(pipe.scheduler).__name__} calls it {order} times"
        )
    target = target_size(height, width, size)
    unit = pixel_multiple(pipe) * pooled
    for name, side in zip(("height", "width"), target, strict=True):
        check_side(name, side, unit)
    native = native_size(pipe)
    _refuse_beyond_positions(pipe, target)
    picture = None
    if image is not None:
        picture = _array("image", image)
        base = picture_size(picture, target, unit)
    else:
        base = first_size(base_size, target, native, unit)
    sizes = split(base, target, factor, unit, from_picture=picture is not None)
    later = len(sizes) - (picture is None)
    given = list(known.strengths[strategy]) if strategy in known.strengths else None
    strength_of = _strengths(pipe, strengths, given, upscale_strength, later, num_inference_steps)
    guidance_of = _guidance(pipe, guidance_scale, known.guidance, len(sizes), picture is None)
    weight = _pull(pipe, low_resolution_guidance)
    stages = []
    if picture is None:
        count = num_inference_steps * order - (order - 1)
        stages.append(Stage(*sizes.pop(0), None, count, guidance_of.pop(0)))
    before = base
    for at, strength, guidance in zip(sizes, strength_of, guidance_of, strict=True):
        count = later_steps(pipe, num_inference_steps, strength)
        if strategy == "superres":
            ratio = math.ceil(max(at) / native)
        else:
            ratio = max(1, round(max(at) / max(base)))
        pull = (1.0 if max(at) > GUIDED_ABOVE else 0.0) if weight is None else weight
        stages.append(
            Stage(
                *at,
                strength=strength,
                steps=count * order - (order - 1),
                guidance_scale=guidance,
                ratio=ratio,
                pull=pull if flows else 0.0,
                enlarged=max(at) / max(before),
            )
        )
        before = at
    length = text_length(pipe)  # of a text encoder made for less than the call takes by default
    if output is not None:
        output = Path(output)
        bytes_needed(output, target[1], target[0])  # refuses what cannot be written
    return Job(
        stages=tuple(stages),
        strategy=strategy,
        steers=steers,
        scales=scales,
        num_inference_steps=num_inference_steps,
        picture=picture,
        control=_control(pipe, control_image),
        call={
            "prompt": prompt,
            "num_inference_steps": num_inference_steps,
            **_negative(pipe, sibling, negative_prompt, extra),
            **({} if length is None else {"max_sequence_length": length}),
            **_extra(pipe, sibling, extra),
        },
        output=output,
        output_type=output_type,
        shift=stage_shift(pipe, shift),
    )


def _refuse_beyond_positions(pipe: Any, target: tuple[int, int]) -> None:
    if not is_transformer(pipe) or is_packed(pipe):
        return
    most = pipe.transformer.config.pos_embed_max_size
    limit = most * pixel_multiple(pipe)
    if max(target) > limit:
        raise ValueError(
            f"size: got {target[1]}×{target[0]}; {type(pipe.transformer).__name__} knows positions"
            f" of {most} tokens a side, so accepted are sides up to {limit} pixels"
        )


def _guidance(
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


def _pull(pipe: Any, given: float | None) -> float | None:
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


def _negative(
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


def _strengths(
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


def _control(pipe: Any, control_image: Any) -> list[np.ndarray] | str | None:
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
    return [_array("control_image", g) for g in given]


def _array(name: str, picture: Any) -> np.ndarray:
    """A picture's pixels; of a file, only paths are opened."""
    if isinstance(picture, np.ndarray):
        return picture
    if not isinstance(picture, (str, os.PathLike, Image.Image)):
        raise ValueError(
            f"{name}: got {picture!r}; accepted are the path of a file, a Pillow image or uint8"
            " [H, W, 3]"
        )
    return open_picture(picture)


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
