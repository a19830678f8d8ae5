"""From a prompt or a picture to 2K, 4K, 8K and 16K, whole-image attention at every stage."""

from __future__ import annotations

import contextlib
import inspect
import shutil
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from linfusion.pipelines.budget import parse_bytes
from linfusion.pipelines.denoise import denoise, whole_picture
from linfusion.pipelines.enlarge import Enlarged
from linfusion.pipelines.forecast import (
    Memory,
    engine_for,
    forecast,
    latent_size,
    latents_dtype,
    make_plan,
)
from linfusion.pipelines.guided import Scales, Statistics, restandardise, statistics
from linfusion.pipelines.pictures import bytes_needed, writer
from linfusion.pipelines.plan import Plan
from linfusion.pipelines.progress import advance, decode_weight, progress, step_weight
from linfusion.pipelines.record import about_run, what_decides
from linfusion.pipelines.resume import Replay, State, pack, seed_of
from linfusion.pipelines.stages import Job, Stage, image_to_image, make_job, one_generator
from linfusion.pipelines.vae import decode_rows, encode_rows

_OF_THE_RUN = (
    *("generator", "state", "resume"),
    *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
)


@dataclass
class HighResOutput(BaseOutput):
    """What a run made.

    Attributes:
        images: one picture as `output_type` asks for, where it was not written to a file.
        path: the file, where it was.
    """

    images: Any = None
    path: Path | None = None


class HighResPipeline:
    """Draws with a text-to-image pipeline at sizes far above the one it was trained at.

    The pipeline draws at its own size; then the picture is enlarged, noised and denoised, stage by
    stage, up to the size wanted. The UNet sees the whole picture at every stage: there are no tiles
    and so no seams. Stages run through diffusers' own calls (the image-to-image sibling of `pipe`),
    so ControlNets, IP-Adapters, LoRAs and schedulers work as they do there; neither a safety
    checker nor a watermark is applied.

    Args:
        pipe: a text-to-image pipeline with a UNet: Stable Diffusion 1.5, 2.1, XL, their ControlNet
            forms; linear (`linfusion.linearize`) or not.
        memory_budget: bytes, or text like "12GB", for the pipeline's models and all that is held at
            once, on the device it runs on; None sets no limit. Python's libraries are not counted.
        scratch: folder for what does not fit into the budget; without it, it is computed again.

    Raises:
        ValueError: no such pipeline, no such budget, no such folder.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        memory_budget: int | str | None = None,
        scratch: str | Path | None = None,
    ) -> None:
        self.pipe = pipe
        self.sibling = image_to_image(pipe)
        self.memory_budget = memory_budget
        self.budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.scratch = None if scratch is None else Path(scratch)
        if self.scratch is not None and not self.scratch.is_dir():
            raise ValueError(f"scratch: there is no folder {self.scratch}")

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        size: int | tuple[int, int] | None = None,
        base_size: int | tuple[int, int] | None = None,
        factor: float = 2.0,
        image: Any = None,
        control_image: Any = None,
        strategy: str = "sdedit",
        strengths: Sequence[float] | float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: str | list[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        cosine_scale_1: float = 3.0,
        cosine_scale_2: float = 1.0,
        cosine_scale_3: float = 1.0,
        gaussian_sigma: float = 0.8,
        upscale_strength: float = 0.32,
        output: str | Path | None = None,
        output_type: str = "pil",
        state: str | Path | None = None,
        resume: bool = False,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **kwargs: Any,
    ) -> HighResOutput:
        """Draw one picture.

        Args:
            prompt: what to draw.
            height, width: of the picture in pixels, multiples of the VAE's factor (8).
            size: instead of them; one side, or (height, width).
            base_size: of the first stage; None takes the area the model was made for.
            factor: from one stage to the next; the last one goes to the exact size.
            image: start from this picture instead of drawing one: a file, a Pillow image or uint8
                [H, W, 3]. It is enlarged by `factor` first.
            control_image: for the ControlNet, resized to each stage; a list for several; or
                "previous", which shows it the enlarged picture of the stage before, as tile
                ControlNets expect (it is off in the first stage).
            strategy: "sdedit" enlarges, noises and denoises (Meng et al. 2022). "guided" is the
                LinFusion authors' recipe after DemoFusion, two passes a step; see
                `linfusion.pipelines.guided`. "superres" is the same from a given picture.
            strengths: share of `num_inference_steps` that each stage after the first denoises, in
                (0, 1]; where there are more stages, the last one repeats. None: 0.4, 0.3, 0.2, 0.1
                for "sdedit"; from `upscale_strength` down in equal steps that would reach 0 after
                the last stage for "guided"; 0.32, 0.24, 0.16, 0.08 for "superres".
            num_inference_steps, guidance_scale, negative_prompt: as for the pipeline.
            generator: the source of every random draw; None takes a fresh seed.
            cosine_scale_1, cosine_scale_2, cosine_scale_3, gaussian_sigma, upscale_strength: of
                "guided".
            output: a .png, .tif or .jpg file to write, band by band; None returns the picture.
            output_type: "pil", "np" (float [1, H, W, 3]), "pt" ([1, 3, H, W]) or "latent".
            state: folder that keeps what was done, so that a run can go on after it was killed.
            resume: go on with the run in `state`, if there is one. Bit for bit the same on a CPU if
                the callbacks change latents alone.
            callback_on_step_end: called as diffusers does, at each step of each stage.
            callback_on_step_end_tensor_inputs: what it gets.
            **kwargs: further arguments of the pipeline's call, for every stage that takes them.

        Raises:
            ValueError: what cannot be done, before any work; the argument is named.
            OSError: a disk is full; what `state` holds stays whole.
        """
        call = {k: v for k, v in locals().items() if k not in ("self", "kwargs")} | kwargs
        job = self._job(call)
        resumed = seed_of(state) if resume and generator is None else None
        generator = one_generator(generator, resumed)
        if state is not None:
            pack(self.pipe.scheduler, {})  # refuses what could not be kept
        if self.budget is not None:
            forecast(self.pipe, self.sibling, job, self.memory_budget, self.scratch)
        self._check_disk(job, state)
        about = about_run(self.pipe, job, generator)
        kept = State(state, what_decides(self.pipe, job, generator, about), resume=resume)
        tensors = list(callback_on_step_end_tensor_inputs)
        with progress(self.pipe, job) as bar:
            latents = self._latents(job, generator, kept, bar, callback_on_step_end, tensors)
            return self._deliver(job, latents, about, bar)

    def plan(
        self, prompt: str | list[str] | None = None, *, measure: bool = True, **call: Any
    ) -> Plan:
        """What the same call would take; nothing is drawn.

        Args:
            prompt, **call: as for the call itself.
            measure: estimate the time, from forwards at small size that take some seconds.

        Raises:
            ValueError: as the call itself.
        """
        defaults = {
            k: v
            for k, v in (HighResPipeline.__call__.__kwdefaults__ or {}).items()
            if k not in call
        }
        job = self._job({"prompt": prompt, **defaults, **call})
        return make_plan(
            self.pipe, self.sibling, job, self.memory_budget, self.scratch, measure=measure
        )

    def _job(self, call: dict[str, Any]) -> Job:
        """A call, checked; what is not the job's is left out of it."""
        call = dict(call)
        for name in _OF_THE_RUN:
            call.pop(name)
        scales = Scales(**{field.name: call.pop(field.name) for field in fields(Scales)})
        known = inspect.signature(make_job).parameters
        extra = {name: call.pop(name) for name in list(call) if name not in known}
        return make_job(self.pipe, self.sibling, scales=scales, extra=extra, **call)

    def _latents(
        self,
        job: Job,
        generator: torch.Generator,
        state: State,
        bar: tqdm,
        callback: Callable[..., dict[str, Any]] | None,
        tensors: list[str],
    ) -> Tensor:
        """Run the stages, and return the latents of the last."""
        memory = Memory(self.pipe, job, self.budget)
        latents: Tensor | None = None
        anchor: Statistics | None = None
        device, dtype = self.pipe._execution_device, latents_dtype(self.pipe)
        for i, stage in enumerate(job.stages):
            finished = state.finished(i)
            start = state.start(i)
            if finished is None and stage.strength is not None:
                picture = None
                if start is None or job.control == "previous":
                    picture = self._enlarged(job, i, latents, memory, bar)
                if start is None:
                    assert picture is not None
                    bar.set_description(f"encoding {stage.name}")
                    start = self._encode(picture, stage, memory).to(dtype).contiguous()
                    state.begin(i, start)
                if job.control != "previous":
                    picture = None  # gigabytes
                start = start.to(device)
            if anchor is None and start is not None and job.picture is not None:
                anchor = statistics(start)
            if finished is not None:
                latents = finished[0].to(device)
                generator.set_state(finished[1])
                advance(bar, step_weight(job, stage) * stage.steps)
            else:
                latents = self._stage(
                    job, i, generator, state, bar, callback, tensors,
                    start=start, previous=picture if start is not None else None, memory=memory,
                )  # fmt: skip
                if job.steers and stage.strength is not None:
                    assert anchor is not None
                    latents = restandardise(latents, anchor)
                state.finish(i, latents, generator)
            if anchor is None:
                anchor = statistics(latents)
        assert latents is not None
        return latents

    def _stage(
        self,
        job: Job,
        index: int,
        generator: torch.Generator,
        state: State,
        bar: tqdm,
        callback: Callable[..., dict[str, Any]] | None,
        tensors: list[str],
        *,
        start: Tensor | None,
        previous: Enlarged | None,
        memory: Memory,
    ) -> Tensor:
        """Denoise one stage, from where it was left."""
        stage = job.stages[index]
        bar.set_description(f"stage {index + 1} of {len(job.stages)}, {stage.name}")
        replay = Replay(state.step(index))
        advance(bar, step_weight(job, stage) * replay.done)

        def on_step(runs: Any, i: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
            changed = dict(callback(runs, i, t, given) or {}) if callback is not None else {}
            latents = changed["latents"] = changed.get("latents", given["latents"]).contiguous()
            if not runs.interrupt:
                state.save_step(index, i + 1, latents, generator, runs.scheduler)
            advance(bar, step_weight(job, stage))
            return changed

        with engine_for(self.pipe, memory, stage, self.scratch):
            latents = denoise(
                self.pipe,
                self.sibling,
                job,
                stage,
                start=start,
                previous=previous,
                generator=generator,
                replay=replay,
                on_step=on_step,
                tensors=tensors,
            )
        if (self.pipe if stage.strength is None else self.sibling).interrupt:
            raise KeyboardInterrupt(f"interrupted in stage {index + 1}, {stage.name}")
        return latents

    def _enlarged(
        self, job: Job, index: int, latents: Tensor | None, memory: Memory, bar: tqdm
    ) -> Enlarged:
        """The picture before a stage, at the stage's size."""
        stage = job.stages[index]
        picture = job.picture
        if index:
            assert latents is not None
            before = job.stages[index - 1]
            bands = self._decode(latents, before, memory, bar, 0)
            picture = whole_picture(bands, before.height, before.width)
        assert picture is not None
        return Enlarged(picture, stage.height, stage.width)

    def _encode(self, picture: Any, stage: Stage, memory: Memory) -> Tensor:
        share = memory.share("encode", stage.height, stage.width)
        with _full_precision(self.pipe.vae):
            return encode_rows(self.pipe.vae, picture, memory_budget=share)

    def _decode(
        self, latents: Tensor, stage: Stage, memory: Memory, bar: tqdm, weight: float
    ) -> Generator[np.ndarray, None, None]:
        bar.set_description(f"decoding {stage.name}")
        share = memory.share("decode", stage.height, stage.width)
        with _full_precision(self.pipe.vae):
            for band in decode_rows(self.pipe.vae, latents, memory_budget=share):
                yield band
                advance(bar, weight * len(band) / stage.height)

    def _deliver(
        self, job: Job, latents: Tensor, about: dict[str, Any], bar: tqdm
    ) -> HighResOutput:
        """The file, or the picture as `output_type` asks for it."""
        stage = job.stages[-1]
        memory = Memory(self.pipe, job, self.budget)
        weight = decode_weight(job)
        if job.output is not None:
            with (
                writer(job.output, job.width, job.height, parameters=about) as file,
                contextlib.closing(self._decode(latents, stage, memory, bar, weight)) as bands,
            ):
                for band in bands:
                    file.write(band)
            return HighResOutput(path=job.output)
        if job.output_type == "latent":
            return HighResOutput(images=latents)
        bands = self._decode(latents, stage, memory, bar, weight)
        picture = whole_picture(bands, job.height, job.width)
        if job.output_type == "pil":
            return HighResOutput(images=[Image.fromarray(picture)])
        values = picture[None].astype(np.float32) / 255
        if job.output_type == "pt":
            return HighResOutput(images=torch.from_numpy(values).permute(0, 3, 1, 2))
        return HighResOutput(images=values)

    def _check_disk(self, job: Job, state: str | Path | None) -> None:
        """What is sure not to fit is refused, what may not is said."""
        if job.output is not None:
            need = bytes_needed(job.output, job.width, job.height)
            free = shutil.disk_usage(job.output.parent).free
            message = f"output: {job.output} takes up to {need:,} bytes, and {free:,} are free"
            if free < need and job.output.suffix.lower() in (".tif", ".tiff"):
                raise ValueError(message)
            if free < need:
                warnings.warn(message, stacklevel=3)
        if state is not None:
            folder = Path(state).resolve()
            while not folder.exists():
                folder = folder.parent
            sizes = [latent_size(self.pipe, s) for s in job.stages]
            held = 4 * self.pipe.vae.config.latent_channels
            need = held * (2 * sum(h * w for h, w in sizes) + 8 * sizes[-1][0] * sizes[-1][1])
            if (free := shutil.disk_usage(folder).free) < need:
                raise ValueError(
                    f"state: {state} takes up to {need:,} bytes, and {free:,} are free"
                )


@contextlib.contextmanager
def _full_precision(vae: Any) -> Iterator[None]:
    """A VAE that overflows in float16 runs in float32 meanwhile, as in SDXL's own pipeline."""
    upcast = vae.dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(torch.float16)
