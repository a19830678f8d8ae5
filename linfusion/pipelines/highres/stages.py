"""What a high-resolution run is to do: its stages, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from linfusion.files.picture_reader import bytes_needed
from linfusion.pipelines.arguments import pixel_multiple, text_length
from linfusion.pipelines.highres.guided import Scales
from linfusion.pipelines.highres.hosts import (
    is_transformer,
    later_steps,
    native_size,
    recipe,
)
from linfusion.pipelines.highres.settings import (
    check_side,
    control_pictures,
    first_size,
    further_arguments,
    guidance_scales,
    negative,
    picture_size,
    pixels_of,
    pull_weight,
    refuse_beyond_positions,
    split,
    strengths_of,
    target_size,
)
from linfusion.pipelines.highres.shift import stage_shift

STRATEGIES = ("sdedit", "guided", "superres")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
GUIDED_ABOVE = 4096  # pixels of the longer side, from which on low-resolution guidance is on


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
    refuse_beyond_positions(pipe, target)
    picture = None
    if image is not None:
        picture = pixels_of("image", image)
        base = picture_size(picture, target, unit)
    else:
        base = first_size(base_size, target, native, unit)
    sizes = split(base, target, factor, unit, from_picture=picture is not None)
    later = len(sizes) - (picture is None)
    given = list(known.strengths[strategy]) if strategy in known.strengths else None
    strength_of = strengths_of(pipe, strengths, given, upscale_strength, later, num_inference_steps)
    guidance_of = guidance_scales(pipe, guidance_scale, known.guidance, len(sizes), picture is None)
    weight = pull_weight(pipe, low_resolution_guidance)
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
        control=control_pictures(pipe, control_image),
        call={
            "prompt": prompt,
            "num_inference_steps": num_inference_steps,
            **negative(pipe, sibling, negative_prompt, extra),
            **({} if length is None else {"max_sequence_length": length}),
            **further_arguments(pipe, sibling, extra),
        },
        output=output,
        output_type=output_type,
        shift=stage_shift(pipe, shift),
    )


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
