"""From a prompt or a picture to 2K, 4K, 8K and 16K, the whole picture at every stage."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor
from tqdm.auto import tqdm

from linfusion.bands.budget import parse_bytes
from linfusion.bands.vae import decode_rows, encode_rows, full_precision
from linfusion.files.enlarged import Enlarged
from linfusion.pipelines.highres.cascade import as_drawn, check_clear, pooled_by, with_windows
from linfusion.pipelines.highres.deliver import as_images, check_disk, write_bands
from linfusion.pipelines.highres.denoise import denoise, whole_picture
from linfusion.pipelines.highres.forecast import Memory, engine_for, forecast, latents_dtype
from linfusion.pipelines.highres.guided import Scales, Statistics, restandardise, statistics
from linfusion.pipelines.highres.hosts import controlnets, image_to_image, is_transformer
from linfusion.pipelines.highres.pace import (
    advance,
    decode_weight,
    make_plan,
    progress,
    step_weight,
)
from linfusion.pipelines.highres.plan import Plan
from linfusion.pipelines.highres.record import about_run, what_decides
from linfusion.pipelines.highres.shift import shifted
from linfusion.pipelines.highres.stages import Job, Stage, make_job, one_generator
from linfusion.pipelines.state import Replay, State, pack, seed_of

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
    stage, up to the size wanted. The denoiser sees the whole picture at every stage: there are no
    tiles and so no seams. Stages run through diffusers' own calls (the image-to-image sibling of
    `pipe`), so ControlNets, IP-Adapters, LoRAs and schedulers work as they do there; neither a
    safety checker nor a watermark is applied.

    Args:
        pipe: a text-to-image pipeline: Stable Diffusion 1.5, 2.1, XL, their ControlNet forms,
            linear (`linfusion.linearize`) or not; FLUX and its ControlNet form, Stable Diffusion 3.
        memory_budget: bytes, or text like "12GB", for the pipeline's models and all that is held at
            once, on the device it runs on; Python's libraries are not counted. Within one, the
            denoiser runs in bands of rows, uncompiled. None runs it as it is, at its own speed, and
            the VAE in bands for more than a megapixel alone.
        scratch: folder for what does not fit into the budget; without it, it is computed again.
        clear: attention of the later stages of FLUX and Stable Diffusion 3; the base picture has
            full attention. Options of `linfusion.linearize(pipe, "clear", ...)`, such as
            `{"weights": ...}`, beside the authors' for large pictures: CLEAR is put on for the run.
            True: as the pipeline is linearized, else with radius 8 and without weights, of which a
            warning tells. False: every stage as the pipeline is.

    Raises:
        ValueError: no such pipeline, no such budget, no such folder, no such setting.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        memory_budget: int | str | None = None,
        scratch: str | Path | None = None,
        clear: Mapping[str, Any] | bool = True,
    ) -> None:
        self.pipe = pipe
        self.sibling = image_to_image(pipe)
        check_clear(pipe, clear)
        self.clear = clear
        self.memory_budget = memory_budget
        self.budget = None if memory_budget is None else parse_bytes(memory_budget)
        if self.budget is not None:
            self._refuse_controlnet("memory_budget")
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
        num_inference_steps: int | None = None,
        guidance_scale: Sequence[float] | float | None = None,
        negative_prompt: str | list[str] | None = None,
        shift: float | None = None,
        low_resolution_guidance: float | None = None,
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
            height, width: of the picture in pixels, multiples of the VAE's factor (8), with FLUX
                and Stable Diffusion 3 of a token's side (16).
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
                `linfusion.pipelines.highres.guided`. "superres" is the same from a given picture.
            strengths: share of `num_inference_steps` that each stage after the first denoises, in
                (0, 1]; where there are more stages, the last one repeats. None: 0.4, 0.3, 0.2, 0.1
                for "sdedit"; from `upscale_strength` down in equal steps that would reach 0 after
                the last stage for "guided"; 0.32, 0.24, 0.16, 0.08 for "superres"; 0.7 for FLUX
                and Stable Diffusion 3.
            num_inference_steps, negative_prompt: as for the pipeline; 50 steps, or 20 for FLUX and
                Stable Diffusion 3. FLUX reads a negative prompt with `true_cfg_scale` above 1.
            guidance_scale: one for all stages, or one a stage; where there are more, the last one
                repeats. None: 7.5; for FLUX a base of 3.5, for Stable Diffusion 3 one of 7.
            shift: of the noise levels in later stages of FLUX and Stable Diffusion 3, see
                `linfusion.pipelines.highres.shift`; None is 3. The base stage has the scheduler's
                own.
            low_resolution_guidance: for FLUX and Stable Diffusion 3, how far later stages are held
                to the picture before, from 0 (off) to 1; see
                `linfusion.pipelines.highres.low_resolution_guidance`. None: 1 for stages of more
                than 4096 pixels a side, 0 for others.
            generator: the source of every random draw; None takes a fresh seed.
            cosine_scale_1, cosine_scale_2, cosine_scale_3, gaussian_sigma, upscale_strength: of
                "guided".
            output: a .png, .tif or .jpg file to write, band by band; None returns the picture.
            output_type: "pil", "np" (float [1, H, W, 3]), "pt" ([1, 3, H, W]) or "latent".
            state: folder that keeps what was done, so that a run can go on after it was killed.
            resume: go on with the run in `state`, if there is one. Bit for bit the same on a CPU if
                the callbacks change latents alone.
            callback_on_step_end: called as diffusers does, at each step of each stage. Where it
                sets `_interrupt` on the pipeline it gets, no other step or stage is run: the output
                has the picture of that stage as it is, and no file is written.
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
        with self._prepared(call, job) as (run, job):
            if run.budget is not None:
                forecast(run.pipe, run.sibling, job, run.memory_budget, run.scratch)
            check_disk(run.pipe, job, state)
            about = about_run(run.pipe, job, generator)
            decisive = {} if state is None else what_decides(run.pipe, job, generator, about)
            tensors = list(callback_on_step_end_tensor_inputs)
            with State(state, decisive, resume=resume) as kept, progress(run.pipe, job) as bar:
                drawn = run._latents(job, generator, kept, bar, callback_on_step_end, tensors)
                return run._deliver(job, *drawn, about, bar)

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
        defaults = HighResPipeline.__call__.__kwdefaults__ or {}
        self._refuse_controlnet("plan")
        call = {"prompt": prompt, **defaults, **call}
        with self._prepared(call, self._job(call)) as (run, job):
            return make_plan(
                run.pipe, run.sibling, job, run.memory_budget, run.scratch, measure=measure
            )

    def _refuse_controlnet(self, name: str) -> None:
        if is_transformer(self.pipe) and controlnets(self.pipe):
            raise ValueError(
                f"{name}: {type(self.pipe).__name__} encodes its control picture and keeps the"
                " ControlNet's residuals whole, which is not counted; accepted is a run without a"
                " budget"
            )

    @contextlib.contextmanager
    def _prepared(self, call: dict[str, Any], job: Job) -> Iterator[tuple[HighResPipeline, Job]]:
        """Within, one of these with attention and scheduler as in later stages, and its job."""
        run = copy.copy(self)
        with (
            with_windows(self.pipe, self.sibling, self.clear) as (run.pipe, run.sibling),
            shifted(run.pipe, run.sibling, job.shift),
        ):
            pooled = pooled_by(run.pipe)
            yield run, job if pooled == 1 else run._job(call, pooled)

    def _job(self, call: dict[str, Any], pooled: int = 1) -> Job:
        """A call, checked; what is not the job's is left out of it."""
        call = dict(call)
        for name in _OF_THE_RUN:
            call.pop(name)
        scales = Scales(**{field.name: call.pop(field.name) for field in fields(Scales)})
        known = inspect.signature(make_job).parameters
        extra = {name: call.pop(name) for name in list(call) if name not in known}
        job = make_job(self.pipe, self.sibling, scales=scales, extra=extra, pooled=pooled, **call)
        softmax = is_transformer(self.pipe) and self.clear is not False
        return replace(job, softmax_base=softmax)

    def _latents(
        self,
        job: Job,
        generator: torch.Generator,
        state: State,
        bar: tqdm,
        callback: Callable[..., dict[str, Any]] | None,
        tensors: list[str],
    ) -> tuple[Tensor, Stage | None]:
        """Latents of the last stage, or of the one that was interrupted, and that one."""
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
                # As a callback has it in diffusers.
                if (self.pipe if stage.strength is None else self.sibling).interrupt:
                    return latents, stage
                if job.steers and stage.strength is not None:
                    assert anchor is not None
                    latents = restandardise(latents, anchor)
                state.finish(i, latents, generator)
            if anchor is None:
                anchor = statistics(latents)
        assert latents is not None
        return latents, None

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

        with (
            as_drawn(self.pipe, job, stage),
            engine_for(self.pipe, memory, stage, self.scratch),
        ):
            return denoise(
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
        with full_precision(self.pipe.vae):
            return encode_rows(self.pipe.vae, picture, memory_budget=share)

    def _decode(
        self, latents: Tensor, stage: Stage, memory: Memory, bar: tqdm, weight: float
    ) -> Generator[np.ndarray, None, None]:
        bar.set_description(f"decoding {stage.name}")
        share = memory.share("decode", stage.height, stage.width)
        with full_precision(self.pipe.vae):
            for band in decode_rows(self.pipe.vae, latents, memory_budget=share):
                yield band
                advance(bar, weight * len(band) / stage.height)

    def _deliver(
        self, job: Job, latents: Tensor, stopped: Stage | None, about: dict[str, Any], bar: tqdm
    ) -> HighResOutput:
        """The file, or the picture as `output_type` asks for it; no file of an unfinished one."""
        stage = stopped or job.stages[-1]
        memory = Memory(self.pipe, job, self.budget)
        to_file = job.output is not None and stopped is None
        if not to_file and job.output_type == "latent":
            return HighResOutput(images=latents)
        bands = self._decode(latents, stage, memory, bar, decode_weight(job))
        if to_file:
            return HighResOutput(path=write_bands(job, bands, about))
        return HighResOutput(images=as_images(job, bands, stage))
