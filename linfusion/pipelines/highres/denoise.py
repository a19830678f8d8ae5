"""One stage: diffusers' own call, with what is to happen around the denoiser."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linfusion.bands.around import Wrapper, around
from linfusion.files.enlarged import Enlarged
from linfusion.pipelines.highres.guided import Guide
from linfusion.pipelines.highres.hosts import called, controlnets, is_transformer, unpacked
from linfusion.pipelines.highres.low_resolution_guidance import Projection
from linfusion.pipelines.highres.settings import parameters_of
from linfusion.pipelines.highres.stages import Job, Stage, as_picture
from linfusion.pipelines.state import Replay

# (pipeline, step, timestep, kwargs) -> what it changes, as for callback_on_step_end
OnStep = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def denoise(
    pipe: Any,
    sibling: Any,
    job: Job,
    stage: Stage,
    *,
    start: Tensor | None,
    previous: Enlarged | None,
    generator: torch.Generator,
    replay: Replay,
    on_step: OnStep,
    tensors: list[str],
    outside: Wrapper | None = None,
    as_shown: Callable[[Any], Any] = as_picture,
) -> Tensor:
    """Run a stage and return its latents, [1, C, H/8, W/8].

    Args:
        pipe, sibling: the text-to-image pipeline and its image-to-image form.
        job, stage: what to run.
        start: latents of the enlarged picture, where the stage has a strength.
        previous: the enlarged picture itself, where a ControlNet looks at it.
        generator: source of all noise.
        replay: of the steps that are done already.
        on_step: called after each step that is not a replayed one.
        tensors: names of what it is to get beside the latents.
        outside: goes around the denoiser's forward and all that is around it already.
        as_shown: a ControlNet's picture, rows of uint8, as its pipeline takes it.
    """
    runs = pipe if stage.strength is None else sibling
    model = called(pipe)
    if hasattr(pipe, "_pag_attn_processors"):  # those `linearize` gave it
        sibling._pag_attn_processors = pipe._pag_attn_processors
    call = {k: v for k, v in job.call.items() if k in parameters_of(runs)}
    call["guidance_scale"] = stage.guidance_scale
    guide = projection = None
    if stage.strength is None or is_transformer(pipe):
        call |= {"height": stage.height, "width": stage.width}
    if stage.strength is not None:
        assert start is not None
        call |= {"image": start, "strength": stage.strength}
        if stage.pull:
            projection = Projection(runs, stage, start)
        if job.steers:
            noise = _noise_to_come(start, generator)
            guide = Guide(pipe.scheduler, start, noise, stage.ratio, job.scales)
    call |= _control(job, stage, previous, runs, as_shown)

    def after(runs: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        if i + 1 <= replay.done:
            latents = replay.restore(runs.scheduler, generator, i + 1)
            return {} if latents is None else {"latents": latents.to(given["latents"].device)}
        replay.now = i + 1
        if guide is not None and i + 1 < runs.num_timesteps:
            following = runs.scheduler.timesteps[i + 1 - runs.num_timesteps]
            given["latents"] = guide.pull(given["latents"], following)
        given["latents"] = given["latents"].contiguous()
        changed = on_step(runs, i, t, given)
        return {"latents": given["latents"], **changed}

    with contextlib.ExitStack() as stack:
        if guide is not None:
            stack.enter_context(around(model, guide.blend))
        if projection is not None:
            stack.enter_context(around(model, projection.follow))
        stack.enter_context(around(model, replay.skip))
        for net in controlnets(pipe):
            stack.enter_context(around(net, replay.skip_control))
        if outside is not None:
            stack.enter_context(around(model, outside))
        stack.enter_context(_quiet(runs))
        latents = runs(
            **call,
            generator=generator,
            output_type="latent",
            callback_on_step_end=after,
            callback_on_step_end_tensor_inputs=list(dict.fromkeys(["latents", *tensors])),
        ).images
    return unpacked(pipe, latents, stage.height, stage.width)


def _control(
    job: Job,
    stage: Stage,
    previous: Enlarged | None,
    runs: Any,
    as_shown: Callable[[Any], Any],
) -> dict[str, Any]:
    """The ControlNets' pictures at the size of the stage."""
    if job.control is None:
        return {}
    nets = controlnets(runs)
    more: dict[str, Any] = {}
    if isinstance(job.control, str):
        if previous is None:  # nothing to look at yet
            blank = np.broadcast_to(np.uint8(0), (stage.height, stage.width, 3))
            pictures = [as_shown(blank)] * len(nets)
            more["controlnet_conditioning_scale"] = 0.0 if len(nets) == 1 else [0.0] * len(nets)
        else:
            pictures = [as_shown(previous)] * len(nets)
    else:
        resized = (Enlarged(control, stage.height, stage.width) for control in job.control)
        pictures = [as_shown(r) for r in resized]
    given = pictures[0] if len(nets) == 1 else pictures
    name = "image" if stage.strength is None and not is_transformer(runs) else "control_image"
    if stage.strength is not None:
        more |= {"height": stage.height, "width": stage.width}
    return {name: given, **more}


def _noise_to_come(like: Tensor, generator: torch.Generator) -> Tensor:
    """The noise that the pipeline is about to draw for its start; the generator stays put."""
    from diffusers.utils.torch_utils import randn_tensor

    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return randn_tensor(tuple(like.shape), twin, like.device, like.dtype)


@contextlib.contextmanager
def _quiet(pipe: Any) -> Any:
    """The pipeline's own progress bar off."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


def whole_picture(bands: Any, height: int, width: int) -> np.ndarray:
    """Bands of rows put together, uint8 [height, width, 3]."""
    picture = np.empty((height, width, 3), np.uint8)
    row = 0
    for band in bands:
        picture[row : row + len(band)] = band
        row += len(band)
    return picture
